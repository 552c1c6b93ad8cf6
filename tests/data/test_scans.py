"""Scans against pydicom, nibabel and arithmetic; a patient whose right side is marked."""

import gzip
import struct
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_windowing
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from data import volumes
from data.images import ImageError, file_kind, image_size, read_image, read_scan
from data.tally import reason_of
from data.volumes import PERCENTILES, read_dicom


def shipped(name: str) -> Path:
    path = get_testdata_file(name, download=False)
    assert path is not None, name
    return Path(path)


def dicomdir(name: str) -> Path:
    return shipped("DICOMDIR").parent / name


def dataset(pixels: np.ndarray, **fields) -> Dataset:
    """A grey DICOM image of unsigned 16-bit pixels (H, W) or (frames, H, W)."""
    ds = Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = pydicom.uid.CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.Rows, ds.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        ds.NumberOfFrames = len(pixels)
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PhotometricInterpretation = "MONOCHROME2"
    for name, value in fields.items():
        setattr(ds, name, value)
    ds.PixelData = pixels.astype("<u2").tobytes()
    return ds


def written(ds: Dataset, path: Path) -> Path:
    ds.save_as(path, enforce_file_format=True)
    return path


def item(**fields) -> Dataset:
    ds = Dataset()
    for name, value in fields.items():
        setattr(ds, name, value)
    return ds


RAMP = np.arange(4096).reshape(64, 64)


@pytest.mark.parametrize(
    "path",
    [
        shipped("MR_small.dcm"),
        shipped("693_J2KI.dcm"),
        shipped("J2K_pixelrep_mismatch.dcm"),  # three windows
        shipped("examples_overlay.dcm"),  # two, 12 bits
        dicomdir("77654033/CR1/6154"),  # MONOCHROME1, 12 bits, slope 0.684
        dicomdir("98892001/CT5N/2062"),
    ],
    ids=lambda path: path.name,
)
def test_windows_are_those_of_pydicom(path):
    ds = pydicom.dcmread(path)
    physical = apply_modality_lut(ds.pixel_array, ds)
    shown = apply_windowing(physical, ds)
    black, white = apply_windowing(np.array([-1e9, 1e9]), ds)
    expected = (shown - black) / (white - black)
    inverted = ds.PhotometricInterpretation == "MONOCHROME1"
    scan = read_scan(path)
    assert np.array_equal(scan.values, physical.astype(np.float32))
    assert np.abs(scan.image_01() - (1 - expected if inverted else expected)).max() < 1e-5
    stated = ds.get("PixelSpacing") or ds.ImagerPixelSpacing
    assert scan.spacing == tuple(map(float, stated))
    assert scan.unit == ds.get("RescaleType", "HU" if ds.Modality == "CT" else "")
    low, high = scan.value_range
    assert (low > high) == inverted


def test_monochrome1_is_shown_inverted(tmp_path):
    window = {"WindowCenter": 2048, "WindowWidth": 4096, "VOILUTFunction": "LINEAR_EXACT"}
    ds = dataset(RAMP, PhotometricInterpretation="MONOCHROME1", **window)
    scan = read_scan(written(ds, tmp_path / "xray.dcm"))
    assert scan.value_range == (4096.0, 0.0)
    assert np.array_equal(scan.values, RAMP)
    assert scan.image_01() == pytest.approx(1 - RAMP / 4096, abs=1e-6)


def test_compressed_files_hold_the_pixels_of_the_plain_one():
    plain = pydicom.dcmread(shipped("MR_small.dcm"))
    pixels = np.frombuffer(plain.PixelData, "<i2").reshape(64, 64)
    for name in ("RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian", "implicit"):
        scan = read_scan(shipped(f"MR_small_{name}.dcm"))
        assert np.array_equal(scan.values, pixels), name
    lossless = read_scan(shipped("SC_rgb_rle.dcm"))
    for name in ("jpeg_gdcm", "jpeg_dcmtk", "dcmtk_+eb+cy+np", "dcmtk_+eb+cy+s4", "gdcm_KY"):
        scan = read_scan(shipped(f"SC_rgb_{name}.dcm"))
        assert scan.colour and not scan.is_volume and scan.value_range == (0.0, 255.0)
        # Rows in the middle of the bars: the loss lies at their borders.
        assert np.abs(scan.values - lossless.values)[5::10].max() <= 8, name
    near = read_scan(shipped("SC_ybr_full_422_uncompressed.dcm"))
    assert np.abs(near.values - lossless.values)[5::10].max() <= 8


def test_colour_tables():
    path = shipped("examples_palette.dcm")
    ds = pydicom.dcmread(path)
    index = np.frombuffer(ds.PixelData, np.uint8)[: ds.Rows * ds.Columns]
    tables = [
        np.frombuffer(ds[f"{colour}PaletteColorLookupTableData"].value, "<u2")
        for colour in ("Red", "Green", "Blue")
    ]
    expected = np.stack([table[index] for table in tables], axis=-1)
    scan = read_scan(path)
    assert np.array_equal(scan.values, expected.reshape(ds.Rows, ds.Columns, 3))
    assert scan.value_range == (0.0, 65535.0)


def test_without_a_window(tmp_path):
    scan = read_scan(shipped("CT_small.dcm"))
    stored = np.frombuffer(pydicom.dcmread(shipped("CT_small.dcm")).PixelData, "<i2")
    hounsfield = stored[: 128 * 128].reshape(128, 128) - 1024.0
    assert np.array_equal(scan.values, hounsfield) and scan.unit == "HU"
    assert scan.value_range == pytest.approx(np.percentile(hounsfield, PERCENTILES))
    assert read_scan(shipped("image_dfl.dcm")).value_range == (0.0, 255.0)  # 8 bits
    rescaled = dataset(RAMP % 256, BitsStored=8, RescaleSlope=2, RescaleIntercept=-10)
    path = written(rescaled, tmp_path / "small.dcm")
    assert read_scan(path).value_range == (-10.0, 500.0)
    assert read_scan(path, value_range=(0, 100)).value_range == (0.0, 100.0)
    no_width = dataset(RAMP, WindowCenter=0, WindowWidth=1)
    scan = read_scan(written(no_width, tmp_path / "width.dcm"))
    assert scan.value_range == pytest.approx(np.percentile(RAMP, PERCENTILES))


def test_tables_and_sigmoids_replace_the_values(tmp_path):
    table = (np.arange(4096) ** 2 // 4096).astype(np.uint16)
    lut = item(LUTDescriptor=[4096, 0, 12], LUTData=table.tolist())
    lut["LUTData"].VR = "US"
    ds = dataset(RAMP, VOILUTSequence=[lut], RescaleType="HU")
    scan = read_scan(written(ds, tmp_path / "table.dcm"))
    assert np.array_equal(scan.values, table[RAMP])
    assert (scan.value_range, scan.unit) == ((0.0, 4095.0), "")
    curve = {"WindowCenter": 1000, "WindowWidth": 500, "VOILUTFunction": "SIGMOID"}
    scan = read_scan(written(dataset(RAMP, **curve), tmp_path / "sigmoid.dcm"))
    assert scan.image_01() == pytest.approx(1 / (1 + np.exp(-4 * (RAMP - 1000) / 500)), abs=1e-6)


def test_frames():
    scan = read_scan(shipped("rtdose.dcm"))
    ds = pydicom.dcmread(shipped("rtdose.dcm"))
    assert scan.is_volume and np.array_equal(scan.values, ds.pixel_array.astype(np.float32))
    one = read_scan(shipped("rtdose.dcm"), frame=7)
    assert not one.is_volume and np.array_equal(one.values, scan.values[7])
    colour = read_scan(shipped("SC_rgb_rle_2frame.dcm"))
    assert colour.is_volume and colour.values.shape == (2, 100, 100, 3)
    assert read_scan(shipped("examples_ybr_color.dcm"), frame=29).values.shape == (240, 320, 3)
    with pytest.raises(ImageError, match=r"rtdose.dcm: frame=15 is none of its 15 frames"):
        read_scan(shipped("rtdose.dcm"), frame=15)


def test_enhanced_files_state_what_holds_for_each_frame(tmp_path):
    pixels = np.stack([np.full((8, 8), value) for value in (10, 20, 30)])
    frames = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, z])],
            PixelValueTransformationSequence=[item(RescaleSlope=slope, RescaleIntercept=0)],
        )
        for z, slope in ((6, 1), (0, 2), (3, 3))
    ]
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.25])],
        FrameVOILUTSequence=[item(WindowCenter=50, WindowWidth=101)],
    )
    groups = {
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": frames,
    }
    path = written(dataset(pixels, Modality="CT", **groups), tmp_path / "enhanced.dcm")
    scan = read_scan(path)
    assert scan.values[:, 0, 0].tolist() == [40.0, 90.0, 10.0]  # by z: 0, 3, 6
    assert scan.value_range == (-0.5, 99.5)
    assert (scan.spacing, scan.unit) == ((3.0, 0.5, 0.25), "HU")
    assert read_scan(path, frame=2).values[0, 0] == 90.0


OBLIQUE = [0.0, 1.0, 0.0, 0.0, 0.0, -1.0]
"""Sagittal: rows run to the back, columns down; the normal points to the patient's right."""


def series(folder: Path, places: list[float], **fields) -> list[Path]:
    """One file a place along the x axis; pixels tell the place; names are in order of the list."""
    folder.mkdir()
    paths = []
    for i, x in enumerate(places):
        ds = dataset(np.full((4, 6), 1000 + x), ImagePositionPatient=[x, 0, 0], **fields)
        ds.ImageOrientationPatient = OBLIQUE
        ds.PixelSpacing, ds.SliceThickness = [0.7, 0.7], 9
        paths.append(written(ds, folder / f"{i}.dcm"))
    return paths


def test_a_series_is_sorted_by_position_and_not_by_name(tmp_path):
    window = {"WindowCenter": 1000, "WindowWidth": 401}
    paths = series(tmp_path / "s", [3.5, -5.0, 12.0, 7.75, -0.75], **window)
    scan = read_dicom(*paths)
    # The normal is (0, 1, 0) x (0, 0, -1) = (-1, 0, 0): from large x to small.
    assert scan.values[:, 0, 0].tolist() == [1012.0, 1007.0, 1003.0, 999.0, 995.0]
    assert scan.value_range == (799.5, 1199.5)
    assert scan.spacing == (pytest.approx(4.25), 0.7, 0.7)
    assert np.array_equal(read_dicom(*paths[::-1]).values, scan.values)


def test_missing_slices_are_told(tmp_path):
    places = [2.0 * i for i in range(40) if not 10 <= i < 20 and i != 30]
    gap = r"s: slices are missing: 2 gaps, the first of 4 mm between slices 8 and 9, .* 2 mm apart"
    with pytest.warns(UserWarning, match=gap):
        scan = read_dicom(*series(tmp_path / "s", places))
    assert scan.values[8:10, 0, 0].tolist() == [1062.0, 1058.0] and scan.spacing[0] == 2.0
    with warnings.catch_warnings(action="error"):
        read_dicom(*series(tmp_path / "uneven", [0, 1, 2.2, 3.1]))


def test_series_without_positions_have_no_gaps_to_tell(tmp_path):
    places = [dataset(np.full((4, 6), i), SliceLocation=5 - i) for i in range(3)]
    paths = [written(ds, tmp_path / f"{i}.dcm") for i, ds in enumerate(places)]
    with warnings.catch_warnings(action="error"):
        assert read_dicom(*paths).values[:, 0, 0].tolist() == [2.0, 1.0, 0.0]


def test_a_series_of_several_windows_gets_one_range(tmp_path):
    paths = series(tmp_path / "a", [0, 1], WindowCenter=5, WindowWidth=9)
    paths += series(tmp_path / "b", [2, 3], WindowCenter=6, WindowWidth=9)
    scan = read_dicom(*paths)
    assert scan.value_range == pytest.approx(np.percentile(scan.values, PERCENTILES))
    assert read_dicom(*paths, value_range=(0, 50)).value_range == (0.0, 50.0)
    real = sorted(dicomdir("98892001/CT5N").iterdir())
    heights = [float(pydicom.dcmread(path).ImagePositionPatient[2]) for path in real]
    stored = [pydicom.dcmread(real[i]).pixel_array - 1024.0 for i in np.argsort(heights)]
    assert np.array_equal(read_dicom(*real).values, stored)


def test_what_is_no_series(tmp_path):
    paths = series(tmp_path / "twice", [0, 1, 1, 2])
    with pytest.raises(ImageError, match=r"twice: 1 slices share ImagePositionPatient"):
        read_dicom(*paths)
    paths = series(tmp_path / "turned", [0, 1])
    ds = pydicom.dcmread(paths[1])
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.save_as(paths[1])
    with pytest.raises(ImageError, match=r"turned: the slices are not parallel"):
        read_dicom(*paths)
    other = written(dataset(np.ones((5, 5)), InstanceNumber=2), tmp_path / "other.dcm")
    first = written(dataset(np.ones((4, 5)), InstanceNumber=1), tmp_path / "first.dcm")
    with pytest.raises(ImageError, match="differ in size"):
        read_dicom(*[other, first])
    nowhere = [written(dataset(np.ones((4, 4))), tmp_path / f"{i}.dcm") for i in range(2)]
    with pytest.raises(ImageError, match="without ImagePositionPatient, SliceLocation or Inst"):
        read_dicom(*nowhere)


def nifti(ras: np.ndarray, path: Path, codes: str = "RAS", zooms=(1.0, 2.0, 3.0), **header) -> Path:
    """A volume that is given along right, anterior, superior, stored along `codes`."""
    image = nibabel.Nifti1Image(ras, np.diag([*zooms, 1.0]))
    target = nibabel.orientations.axcodes2ornt(codes)
    image = image.as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), target)
    )
    assert "".join(nibabel.aff2axcodes(image.affine)) == codes
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "ASL", "SRA"])
def test_slices_are_shown_as_radiologists_see_them(codes, tmp_path):
    """An L in the right anterior upper corner: three to the left, two back, one down."""
    ras = np.zeros((5, 6, 7), np.int16)
    ras[4, 5, 6] = 9
    ras[1:4, 5, 6], ras[4, 3:5, 6], ras[4, 5, 5] = 1, 2, 3
    path = nifti(ras, tmp_path / "marker.nii.gz", codes)
    axial = read_scan(path, axis="axial")
    assert axial.values.shape == (7, 6, 5) and axial.values.dtype == np.float32
    assert axial.values[6, 0].tolist() == [9, 1, 1, 1, 0]  # right is on the left
    assert axial.values[6, :, 0].tolist() == [9, 2, 2, 0, 0, 0]  # anterior is up
    assert axial.values[:, 0, 0].tolist() == [0, 0, 0, 0, 0, 3, 9]  # upwards
    coronal = read_scan(path, axis="coronal")
    assert coronal.values[5, 0].tolist() == [9, 1, 1, 1, 0]
    assert coronal.values[5, :, 0].tolist() == [9, 3, 0, 0, 0, 0, 0]  # the head is up
    sagittal = read_scan(path, axis="sagittal")
    assert sagittal.values[4, 0].tolist() == [9, 2, 2, 0, 0, 0]  # anterior is on the left
    assert sagittal.values[4, :, 0].tolist() == [9, 3, 0, 0, 0, 0, 0]
    spacings = [scan.spacing for scan in (axial, coronal, sagittal)]
    assert spacings == [(3.0, 2.0, 1.0), (2.0, 3.0, 1.0), (1.0, 3.0, 2.0)]
    one = read_scan(path, axis="axial", frame=6)
    assert np.array_equal(one.values, axial.values[6]) and one.spacing == (2.0, 1.0)
    with pytest.raises(ImageError, match=r"marker.nii.gz: frame=7 is none of its 7 slices"):
        read_scan(path, frame=7)


def test_spacings_of_volumes_are_in_mm(tmp_path):
    known = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001, 5: 1.0}  # 5 is no unit
    for code, mm in known.items():
        for seconds in (0, 8):
            zooms = [side / mm for side in (0.5, 0.25, 2.0)]
            units = {"xyzt_units": code + seconds}
            path = nifti(np.ones((4, 5, 6), np.int16), tmp_path / "v.nii", "PIR", zooms, **units)
            assert read_scan(path).spacing == pytest.approx((2.0, 0.25, 0.5)), code


def test_ranges_of_volumes(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(300, 80, (6, 7, 8)).astype(np.float32)
    values[0, 0, 0] = np.nan
    scan = read_scan(nifti(values, tmp_path / "plain.nii"))
    lowest = np.where(np.isnan(values), np.nanmin(values), values)
    assert np.sort(scan.values, axis=None) == pytest.approx(np.sort(lowest, axis=None))
    assert scan.value_range == pytest.approx(np.percentile(lowest, PERCENTILES))
    assert scan.image_01().min() == 0 and scan.image_01().max() == 1
    stated = nifti(values, tmp_path / "stated.nii", cal_min=100, cal_max=500)
    assert read_scan(stated).value_range == (100.0, 500.0)
    assert read_scan(stated, value_range=(0, 9)).value_range == (0, 9)
    bytes_ = nifti(rng.integers(0, 99, (4, 4, 4), np.uint8), tmp_path / "bytes.nii")
    assert read_scan(bytes_).value_range == (0.0, 255.0)
    image = nibabel.Nifti1Image(np.arange(64, dtype=np.int16).reshape(4, 4, 4), np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    path = tmp_path / "scaled.nii"
    nibabel.save(image, path)
    expected = np.sort(np.asanyarray(nibabel.load(path).dataobj), axis=None)
    assert np.sort(read_scan(path).values, axis=None) == pytest.approx(expected)
    constant = read_scan(nifti(np.full((3, 3, 3), 7, np.int16), tmp_path / "constant.nii"))
    assert constant.image_01().tolist() == np.zeros((3, 3, 3)).tolist()


def test_volumes_in_time_are_chosen(tmp_path):
    values = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)
    path = tmp_path / "bold.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    with pytest.raises(ImageError, match=r"bold.nii.gz: volume=None of 5 volumes"):
        read_scan(path)
    with pytest.raises(ImageError, match=r"volume=5 of 5 volumes"):
        read_scan(path, volume=5)
    found = read_scan(path, volume=3).values
    assert np.array_equal(found, values[..., 3].transpose(2, 1, 0)[:, ::-1, ::-1])
    single = tmp_path / "single.nii"
    nibabel.save(nibabel.Nifti1Image(values[..., :1], np.eye(4)), single)
    assert read_scan(single).values.shape == (4, 3, 2)
    coloured = np.zeros((2, 2, 2), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(coloured, np.eye(4)), tmp_path / "rgb.nii")
    with pytest.raises(ImageError, match=r"rgb.nii: .* is no volume of real numbers"):
        read_scan(tmp_path / "rgb.nii")


def test_sizes_are_checked_before_anything_is_decoded(tmp_path, monkeypatch):
    """Headers that promise terabytes, in files of some hundred bytes."""
    whole = bytearray(nifti(np.zeros((2, 2, 2), np.int16), tmp_path / "v.nii").read_bytes())
    huge, far = whole.copy(), whole.copy()
    struct.pack_into("<4h", huge, 40, 3, 4000, 4000, 30000)
    struct.pack_into("<f", far, 108, 2.0**40)
    for name, content in (("huge", huge), ("far", far)):
        with gzip.open(tmp_path / f"{name}.nii.gz", "wb") as file:
            file.write(content)
    with pytest.raises(ImageError, match=r"huge.nii.gz: 4000x4000x30000 is more than \d+ voxels"):
        read_scan(tmp_path / "huge.nii.gz")
    with pytest.raises(
        ImageError, match=r"far.nii.gz: too short for shape .* from byte 1099511627776"
    ):
        read_scan(tmp_path / "far.nii.gz")
    ds = dataset(np.zeros((4, 4)))
    ds.Rows = ds.Columns = 65535
    with pytest.raises(
        ImageError, match=r"wide.dcm: 65535x65535 is more than \d+ pixels"
    ) as caught:
        image_size(written(ds, tmp_path / "wide.dcm"))
    assert reason_of(caught.value) == "oversized_image"
    monkeypatch.setattr(volumes, "MAX_VOXELS", 7)
    with pytest.raises(ImageError, match=r"v.nii: 2x2x2 is more than 7 voxels"):
        read_scan(tmp_path / "v.nii")
    with pytest.raises(ImageError, match=r"rtdose.dcm: 10x10x15 is more than 7 voxels"):
        read_scan(shipped("rtdose.dcm"))


def test_damage_is_an_image_error_with_the_name_of_the_file(tmp_path):
    rng = np.random.default_rng(0)
    volume = nifti(rng.normal(size=(4, 5, 6)).astype(np.float32), tmp_path / "v.nii")
    packed = nifti(rng.normal(size=(4, 5, 6)).astype(np.float32), tmp_path / "v.nii.gz")
    dicoms = [shipped(f"MR_small{kind}.dcm") for kind in ("", "_RLE", "_jp2klossless")]
    refused = 0
    for path in (volume, packed, *dicoms):
        whole, damaged = path.read_bytes(), tmp_path / f"bad_{path.name}"
        for length in (0, 10, 131, 140, 300, 347, len(whole) // 2):
            damaged.write_bytes(whole[:length])
            with pytest.raises(ImageError, match=damaged.name):
                read_scan(damaged)
        for _ in range(60):
            content = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 1500), 3):
                content[place] = rng.integers(256)
            damaged.write_bytes(content)
            try:
                assert np.isfinite(read_scan(damaged).image_01()).all()
            except ImageError as error:
                assert damaged.name in str(error)
                refused += 1
    assert refused > 20
    for name in ("nowhere.dcm", "nowhere.nii", "nowhere.nii.gz", "nowhere.tif"):
        with pytest.raises(ImageError, match=name):
            read_scan(tmp_path / name)
    with pytest.raises(ImageError, match=r"MR_truncated.dcm: "):
        read_scan(shipped("MR_truncated.dcm"))
    with pytest.raises(ImageError, match=r"rtplan.dcm: a DICOM file without an image"):
        read_scan(shipped("rtplan.dcm"))


def test_a_missing_package_says_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(volumes.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pydicom.* is needed .*\[dicom\]"):
        read_scan(shipped("MR_small.dcm"))


def test_kinds_of_files(tmp_path):
    assert file_kind(dicomdir("77654033/CR1/6154")) == "dicom"  # no suffix
    bare = tmp_path / "bare.DCM"
    bare.write_bytes(b"no preamble")
    assert file_kind(bare) == "dicom"
    for name in ("v.nii", "v.NII.GZ"):
        assert file_kind(tmp_path / name) == "nifti"
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    assert file_kind(tmp_path / "a.png") == "image"


def test_the_model_reads_single_dicom_images(tmp_path):
    path = dicomdir("77654033/CR1/6154")
    shown = read_image(path)
    assert shown.mode == "RGB" and shown.size == image_size(path) == (16, 16)
    expected = np.round(read_scan(path).image_01() * 255)
    assert np.array_equal(np.asarray(shown)[..., 1], expected)
    assert image_size(shipped("examples_overlay.dcm")) == (484, 300)
    with pytest.raises(ImageError, match="rtdose.dcm: a volume of 15 slices: see make_pairs.py"):
        read_image(shipped("rtdose.dcm"))
    volume = nifti(np.zeros((2, 3, 4), np.int16), tmp_path / "brain.nii")
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match="brain.nii: NIfTI holds volumes: see make_pairs.py"):
            read(volume)


def test_deep_greys(tmp_path):
    values = np.array([[0.0, 0.25], [0.5, 1.0]], np.float32)
    Image.fromarray(values).save(tmp_path / "float.tif")
    assert np.asarray(read_image(tmp_path / "float.tif"))[..., 0].tolist() == [[0, 64], [128, 255]]
    scan = read_scan(tmp_path / "float.tif")
    assert np.array_equal(scan.values, values) and scan.value_range == (0.0, 1.0)
    integers = np.array([[0, 257], [65535, 12850]], np.int32)
    Image.fromarray(integers).save(tmp_path / "int.tif")
    assert np.asarray(read_image(tmp_path / "int.tif"))[..., 2].tolist() == [[0, 1], [255, 50]]
    Image.fromarray(integers.astype(np.uint16)).save(tmp_path / "short.tif")
    assert read_scan(tmp_path / "short.tif").values.tolist() == integers.tolist()
    assert read_scan(tmp_path / "short.tif").value_range == (0.0, 65535.0)
    unknown = np.array([[-1000.0, 3000.0], [np.nan, 0.0]], np.float32)
    for name, array in (
        ("hu.tif", unknown[:1]),
        ("nan.tif", unknown[1:]),
        ("long.tif", integers * 9),
    ):
        Image.fromarray(array).save(tmp_path / name)
        with pytest.raises(ImageError, match=rf"{name}: its values .* leave .*--value_range"):
            read_image(tmp_path / name)
    scan = read_scan(tmp_path / "hu.tif", value_range=(-1000, 1000))
    assert scan.image_01().tolist() == [[0.0, 1.0]] and scan.values[0, 1] == 3000


def test_grey_colour_and_pages(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    pages = [Image.fromarray(page) for page in rgb]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert np.array_equal(np.asarray(read_image(tmp_path / "pages.tif")), rgb[0])
    third = read_scan(tmp_path / "pages.tif", frame=2)
    assert third.colour and np.array_equal(third.values, rgb[2])
    with pytest.raises(ImageError, match=r"pages.tif"):
        read_scan(tmp_path / "pages.tif", frame=3)
    Image.fromarray(rgb[0, ..., 0]).save(tmp_path / "grey.png")
    grey = read_scan(tmp_path / "grey.png")
    assert np.array_equal(grey.values, rgb[0, ..., 0]) and grey.value_range == (0.0, 255.0)
    assert grey.image_01() == pytest.approx(rgb[0, ..., 0] / 255, abs=1e-6)
    Image.fromarray(rgb[0, ..., 0] > 99).save(tmp_path / "mask.png")
    assert np.array_equal(read_scan(tmp_path / "mask.png").image_01(), rgb[0, ..., 0] > 99)
