"""The pictures and the table of docs/degradations.md, from the images that pip packages ship.

python -m scripts.experiments.degradation_sheet --out docs

One picture for each degradation: clean, then rising severities. The table replaces the one that
stands between the marks of the page.
"""

import argparse
from pathlib import Path

import nibabel
import nilearn
import numpy as np
import pydicom
import pydicom.data
import skimage.data
from PIL import Image
from scipy import ndimage

from data.degradations import DEGRADATIONS, degrade, low_resolution
from data.degradations.registry import Parameter

ROOT = Path(__file__).parents[2]
SEVERITIES = (0.25, 0.6, 1.0)
TABLE_SEVERITIES = (0.25, 0.5, 0.75, 1.0)
MARKS = "<!-- table -->\n", "<!-- end of table -->\n"
HEAD_CT = "J2K_pixelrep_mismatch.dcm"
CT_RANGE_HU = (-1000.0, 1900.0)
CT_DISPLAY_HU = (-150.0, 250.0)
MR_SLICE_MM = 84
BRAIN = (slice(18, 214), slice(18, 180))
GREY_UPTAKE, WHITE_UPTAKE, PET_SIGMA_MM = 1.0, 0.25, 2.1
TILE, GAP = 224, 4
SEED = 3


def _axial(name: str) -> np.ndarray:
    """An axial slice of a shipped ICBM152 volume, 1 mm pixels, nose up, in [0, 1]."""
    folder = Path(nilearn.__file__).parent / "datasets" / "data"
    volume = np.asarray(nibabel.load(folder / name).dataobj[:, :, MR_SLICE_MM], dtype=float)
    return np.rot90(volume)[BRAIN] / 255.0


def mr() -> np.ndarray:
    return _axial("mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")


def pet() -> np.ndarray:
    """Uptake that grey and white matter have with FDG, at a scanner's resolution, 2 mm pixels."""
    grey = _axial("mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz")
    white = _axial("mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz")
    uptake = ndimage.gaussian_filter(GREY_UPTAKE * grey + WHITE_UPTAKE * white, PET_SIGMA_MM)
    return low_resolution(uptake[: uptake.shape[0] // 2 * 2, : uptake.shape[1] // 2 * 2], 2)


def head_ct() -> tuple[np.ndarray, float]:
    """A slice in CT_RANGE_HU as [0, 1], and the side of its pixels in mm."""
    scan = pydicom.dcmread(pydicom.data.get_testdata_file(HEAD_CT, download=False))
    hounsfield = scan.pixel_array * float(scan.RescaleSlope) + float(scan.RescaleIntercept)
    return _window(hounsfield, CT_RANGE_HU), float(scan.PixelSpacing[0])


def _window(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return np.clip((values - limits[0]) / (limits[1] - limits[0]), 0.0, 1.0)


def retina() -> np.ndarray:
    photo = Image.fromarray(skimage.data.retina()).resize((448, 448), Image.Resampling.LANCZOS)
    return np.asarray(photo) / 255.0


def histology() -> np.ndarray:
    return skimage.data.immunohistochemistry()[:TILE, :TILE] / 255.0


def clean_image(name: str) -> tuple[np.ndarray, dict]:
    """An image on which the degradation occurs, and what `degrade` has to know of it."""
    modality = DEGRADATIONS[name].modalities[0]
    if modality == "CT":
        image, pixel_mm = head_ct()
        return image, {"hu_range": CT_RANGE_HU, "pixel_mm": pixel_mm}
    return {"MR": mr, "PT": pet, "OP": retina, "SM": histology}[modality](), {}


def _tile(image_01: np.ndarray, size: tuple[int, int], is_ct: bool) -> Image.Image:
    if is_ct:
        low, high = CT_RANGE_HU
        image_01 = _window(low + image_01 * (high - low), CT_DISPLAY_HU)
    pixels = Image.fromarray(np.round(image_01 * 255).astype(np.uint8)).convert("RGB")
    enlarged = pixels.width <= size[0]
    return pixels.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def sheet(name: str) -> Image.Image:
    """Clean, then rising severities of one degradation, side by side."""
    image, calibration = clean_image(name)
    results = [
        degrade(name, image, s, np.random.default_rng(SEED), **calibration).image_01
        for s in SEVERITIES
    ]
    height, width = image.shape[:2]
    # Enlarged by whole numbers: others would add a pattern of their own to noise.
    zoom = TILE / width if width > TILE else round(TILE / width)
    size = round(width * zoom), round(height * zoom)
    tiles = [_tile(found, size, bool(calibration)) for found in (image, *results)]
    joined = Image.new("RGB", (len(tiles) * (size[0] + GAP) - GAP, size[1]), "white")
    for i, tile in enumerate(tiles):
        joined.paste(tile, (i * (size[0] + GAP), 0))
    return joined


def table() -> str:
    """Markdown: what each severity stands for."""
    head = ["name", "task", "parameter", "unit", *map(str, TABLE_SEVERITIES), "literature"]
    lines = [head, ["---"] * len(head)]
    for entry in DEGRADATIONS.values():
        first = [f"`{entry.name}`", entry.task]
        for name, parameter in entry.varying.items():
            lines.append([*first, f"`{name}`", *_values(parameter), entry.reference])
            first = ["", ""]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _values(parameter: Parameter) -> list[str]:
    return [parameter.unit, *(f"{parameter.at(s):.3g}" for s in TABLE_SEVERITIES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of degradations.md")
    parser.add_argument("--only", choices=DEGRADATIONS, help="one picture instead of all")
    args = parser.parse_args()
    folder = args.out / "degradations"
    folder.mkdir(exist_ok=True)
    for name in [args.only] if args.only else DEGRADATIONS:
        sheet(name).save(folder / f"{name}.jpg", quality=85)
    page = args.out / "degradations.md"
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
