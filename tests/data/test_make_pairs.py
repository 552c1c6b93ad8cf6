"""The command that makes training sets of scans: splits, records, pixels, refusals."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.config import load_mixture
from data.degradations import degrade, low_resolution
from data.images import read_image, read_scan
from data.sources import JsonlRecords, good_records
from data.tasks import RestorationTask
from data.tokenizer import Tokenizer
from data.transforms import ResizeRule
from scripts.tiny import images as tiny
from scripts.tiny import make_pairs as recipe
from scripts.tiny.tokenizer import write_tokenizer
from scripts.tools import make_pairs
from scripts.tools.scan_sources import find_sources, joined, natural, warn_of_patients
from scripts.tools.splits import PARTS, split_patients, split_slices
from tests.data.test_scans import OBLIQUE, dataset, nifti, shipped, written

ROOT = Path(__file__).parents[2]
NOISE = ("--degrade", "mri_noise:0.4")


def made(*arguments: object) -> dict[str, list[dict]]:
    """Runs the command; the records of every part."""
    args = make_pairs.parse([str(argument) for argument in arguments])
    make_pairs.write_set(args)
    files = {part: args.out / f"{part}.jsonl" for part in PARTS}
    return {
        part: [json.loads(line) for line in path.read_text().splitlines()]
        for part, path in files.items()
        if path.exists()
    }


def pixels(folder: Path, entry: list[dict]) -> np.ndarray:
    return np.asarray(Image.open(folder / entry[0]["path"]))


def brain(path: Path, seed: int = 0, slices: int = 6) -> Path:
    """A volume of bright slices between two black ones, 40 x 36 pixels of 1 mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(100, 1000, (36, 40, slices), dtype=np.int16)
    values[..., [0, -1]] = 0
    return nifti(values, path, zooms=(1, 1, 2), cal_min=0, cal_max=1000)


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Path:
    """Five patients, the first of them scanned twice."""
    folder = tmp_path_factory.mktemp("bids")
    for i, name in enumerate(["sub-1_ses-1", "sub-1_ses-2", "sub-2", "sub-3", "sub-4", "sub-5"]):
        brain(folder / f"{name}_T1w.nii.gz", seed=i)
    return folder


@pytest.fixture(scope="module")
def one_set(patients, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "brains"
    made(patients, "--out", out, *NOISE, "--degrade", "downsampling:0.1-1", "--draws", 2)
    return out


def records(folder: Path) -> dict[str, list[dict]]:
    return {
        part: [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
        for part in PARTS
    }


def test_patients_are_not_divided(patients, one_set):
    found = {s.name: s.patient for s in find_sources(patients, "sub-[0-9]+")}
    assert found == {name: name[:5] for name in found} and len(found) == 6
    owners = {
        part: {re.search(r"sub-\d", r["volume"]).group() for r in lines}
        for part, lines in records(one_set).items()
    }
    assert [len(owners[part]) for part in PARTS] == [3, 1, 1]
    assert set.union(*owners.values()) == {f"sub-{i}" for i in range(1, 6)}


def test_a_record_says_what_was_done(one_set):
    """The degraded picture comes again from the clean one and the record alone."""
    everything = [r for lines in records(one_set).values() for r in lines]
    assert len(everything) == 6 * 4 * 2 * 2  # black slices are left out
    assert {r["slice"] for r in everything} == {1, 2, 3, 4}
    factors = set()
    for record in everything:
        clean, degraded = (pixels(one_set, record[k]) for k in ("output_img", "input_img"))
        done = record["degradation"]
        assert record["value_range"] == [0.0, 1000.0] and record["unit"] == ""
        assert clean.dtype == degraded.dtype == np.uint16 and clean.shape == (32, 32)
        for key, image in (("output_img", clean), ("input_img", degraded)):
            assert (record[key][0]["height"], record[key][0]["width"]) == image.shape
        assert record["degrade_type"] == done["name"]
        again = degrade(done["name"], clean / 65535, done["severity"], np.random.default_rng(0))
        assert again.parameters == done["parameters"]
        assert record["main_task_type"] == again.task
        assert record["message"][1] == {"from": "gpt", "value": again.sentence}
        if done["name"] == "downsampling":
            factor = done["parameters"]["factor"]
            factors.add(factor)
            expected = low_resolution(clean / 65535, factor)
            assert np.abs(degraded / 65535 - expected).max() < 2e-5
        else:
            assert done["severity"] == 0.4 and done["parameters"]["sigma"] == pytest.approx(0.08)
            noise = (degraded - clean.astype(float))[clean > 32768] / 65535
            assert 0.06 < noise.std() < 0.09  # bright pixels are clipped above
    assert len(factors) > 1


def test_clean_images_are_the_slices(patients, one_set):
    import nibabel

    for record in records(one_set)["train"][:3]:
        path = patients / f"{record['volume']}.nii.gz"
        axial = nibabel.load(path).get_fdata()[::-1, ::-1, record["slice"]].T
        expected = np.round(axial[4:36, 2:34] / 1000 * 65535)  # the middle, multiples of 16
        assert np.abs(pixels(one_set, record["output_img"]) - expected).max() <= 1


def test_the_set_trains_as_it_is(one_set):
    (group,) = load_mixture(one_set / "mixture.yaml")
    assert group.image_transform_args.image_stride == 16
    assert group.vit_image_transform_args.image_stride == 14
    (dataset_,) = group.datasets
    lines = [*good_records(JsonlRecords(dataset_.jsonl_path))]
    assert len(lines) == len(records(one_set)["train"])
    for record in lines:
        (given,) = record.inputs
        assert read_image(dataset_.data_dir / given.path).size == given.size
        assert record.instruction and record.assessment


def test_equal_arguments_write_equal_files(patients, one_set, tmp_path):
    arguments = *NOISE, "--degrade", "downsampling:0.1-1", "--draws", 2, "--name", "brains"
    made(patients, "--out", tmp_path / "same", *arguments, "--workers", 2)
    files = sorted(p.relative_to(one_set) for p in one_set.rglob("*") if p.is_file())
    again = sorted(p.relative_to(tmp_path / "same") for p in (tmp_path / "same").rglob("*.*"))
    assert files == again
    for file in files:
        assert (one_set / file).read_bytes() == (tmp_path / "same" / file).read_bytes(), file
    made(patients, "--out", tmp_path / "other", *arguments, "--seed", 1)
    inputs = [
        np.asarray(Image.open(folder / "images" / part / f"{name}_0001_mri_noise_0.png"))
        for folder in (one_set, tmp_path / "other")
        for name in ("sub-2_T1w",)
        for part in PARTS
        if (folder / "images" / part / f"{name}_0001_mri_noise_0.png").exists()
    ]
    assert len(inputs) == 2 and not np.array_equal(*inputs)


def test_another_set_is_not_overwritten(patients, one_set):
    before = (one_set / "train.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"--out .*brains is not empty"):
        made(patients, "--out", one_set, *NOISE)
    assert (one_set / "train.jsonl").read_bytes() == before


def test_a_single_volume_is_cut_into_slabs_aloud(tmp_path, capsys):
    path = brain(tmp_path / "alone.nii.gz", slices=60)
    parts = made(path, "--out", tmp_path / "set", *NOISE, "--gap", 4)
    found = {part: sorted(r["slice"] for r in lines) for part, lines in parts.items()}
    assert found["test"] == list(range(27, 33)) and found["val"] == list(range(17, 23))
    assert found["train"] == [*range(1, 13), *range(37, 59)]
    said = capsys.readouterr().out
    assert "WARNING: alone is the only volume" in said
    assert "test: slices 27 to 32" in said and "val: slices 17 to 22" in said
    assert "left out: 2 nearly black, 12 in gaps" in said
    with pytest.raises(ValueError, match="10 slices: too few for --val, --test, --gap"):
        split_slices(10, 0.1, 0.1, gap=8)
    with pytest.raises(ValueError, match="too few"):
        split_slices(60, 0.0, 0.1, gap=8, test_slices=(50, 61))


@pytest.mark.parametrize(("count", "val", "test", "gap"), [(60, 0.1, 0.1, 8), (200, 0.2, 0.3, 3)])
def test_slabs_are_far_apart(count, val, test, gap):
    parts = split_slices(count, val, test, gap)
    assert parts.count("val") == round(val * count) and parts.count("test") == round(test * count)
    for i in range(count):
        for j in range(max(0, i - gap), i):
            assert parts[i] is None or parts[j] is None or parts[i] == parts[j]


def test_shares_of_patients():
    names = {f"p{i}" for i in range(40)}
    parts = split_patients(names, 0.1, 0.2, seed=3)
    assert parts.keys() == names
    assert [list(parts.values()).count(part) for part in PARTS] == [28, 4, 8]
    assert parts == split_patients(names, 0.1, 0.2, seed=3) != split_patients(names, 0.1, 0.2, 4)
    assert list(split_patients({"a", "b", "c"}, 0.1, 0.1, 0).values()).count("train") == 1
    with pytest.raises(ValueError, match=r"2 patients are too few for --val 0.1 and --test 0.1"):
        split_patients({"a", "b"}, 0.1, 0.1, 0)


def dicom_folder(folder: Path, owner: str, places: list[float], **fields) -> None:
    """A series whose files are named against their order; pixels tell the place."""
    folder.mkdir(parents=True)
    for i, place in enumerate(places):
        image = np.full((32, 48), 500 + 10 * place)
        ds = dataset(image, PatientID=owner, ImagePositionPatient=[-place, 0, 0], **fields)
        ds.SeriesInstanceUID = fields.get("SeriesInstanceUID", f"1.2.{len(owner)}.{owner[-1:]}")
        ds.ImageOrientationPatient, ds.PixelSpacing = OBLIQUE, [1.5, 1.0]
        ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = 500, 1000, "LINEAR_EXACT"
        written(ds, folder / f"{len(places) - i:03d}.dcm")


def test_dicom_series_go_by_patient_and_position(tmp_path, capsys):
    scale = {"Modality": "CT", "RescaleSlope": 2, "RescaleIntercept": -1000}
    shown = "--value_range", -1000, 1000
    for number in "123":
        dicom_folder(tmp_path / "ct" / f"x{number}", f"Doe{number}", [9, 5, 7], **scale)
    (tmp_path / "ct" / "DICOMDIR").write_bytes(shipped("DICOMDIR").read_bytes())
    out = tmp_path / "set"
    parts = made(tmp_path / "ct", "--out", out, "--degrade", "ct_sparse_views:0.5", *shown)
    assert [len({r["volume"] for r in parts[p]}) for p in PARTS] == [1, 1, 1]
    assert "Doe" not in "".join((out / f"{p}.jsonl").read_text() for p in PARTS)
    for lines in parts.values():
        values = []
        for record in sorted(lines, key=lambda r: r["slice"]):
            assert (record["unit"], record["value_range"]) == ("HU", [-1000.0, 1000.0])
            known = record["degradation"]["parameters"]
            assert (known["hu_low"], known["hu_high"], known["pixel_mm"]) == (-1000.0, 1000.0, 1.0)
            image = pixels(out, record["output_img"])
            # 32 rows of 1.5 mm and 48 columns of 1 mm become square pixels of 1 mm.
            assert image.shape == (48, 48) and image.dtype == np.uint16
            values.append(round(float(image.mean()) / 65535 * 2000 - 1000))
        assert values == [100, 140, 180]  # 2 (500 + 10 place) - 1000 HU, by place
    assert "left out: 1 DICOM files, the first is" in capsys.readouterr().out


def ct(path: Path, **header) -> Path:
    """Water, fat and bone in air, 32 x 32 pixels of 2 mm."""
    hu = np.full((32, 32, 2), -1000, np.int16)
    hu[6:26, 6:26], hu[10:14, 10:14], hu[20:24, 20:24] = 0, -100, 1500
    return nifti(hu, path, zooms=(2, 2, 2), **header)


LOW_DOSE = "--degrade", "ct_low_dose:0.8", "--val", 0, "--test", 0


def test_a_stated_range_of_ct_reaches_the_sinogram(tmp_path):
    path, out = ct(tmp_path / "ct.nii.gz"), tmp_path / "set"
    lines = made(path, "--out", out, *LOW_DOSE, "--value_range", -1024, 3071)["train"]
    assert len(lines) == 2
    for record in lines:
        known = record["degradation"]["parameters"]
        assert (known["hu_low"], known["hu_high"]) == (-1024.0, 3071.0)
        assert (record["unit"], record["value_range"]) == ("HU", [-1024.0, 3071.0])
        clean, noisy = (pixels(out, record[k]) / 65535 for k in ("output_img", "input_img"))
        again = degrade(
            "ct_low_dose", clean, 0.8, np.random.default_rng(0), hu_range=(-1024, 3071), pixel_mm=2
        )
        inside = np.s_[8:24, 8:24]
        spread, expected = ((x - clean)[inside].std() for x in (noisy, again.image_01))
        assert 0.75 < spread / expected < 1.33


@pytest.mark.parametrize(
    ("header", "options", "fault"),
    [
        ({}, (), "does not state: give --value_range -1000 1000"),
        ({"cal_min": -1000, "cal_max": 1000}, (), "does not state: give --value_range -1000 1000"),
        ({}, ("--value_range", -160, 240), r"black is -160 HU .*give --value_range -1000 1000"),
    ],
)
def test_ct_needs_hounsfield_units_with_black_air(tmp_path, header, options, fault):
    path, out = ct(tmp_path / "body.nii.gz", **header), tmp_path / "set"
    with pytest.raises(ValueError, match=f"body.nii.gz: slice 0: ct_low_dose.*{fault}"):
        made(path, "--out", out, *LOW_DOSE, *options)
    assert not out.exists()


def test_pictures_are_no_hounsfield_units(tmp_path, capsys):
    Image.fromarray(np.full((32, 32), 90, np.uint8)).save(tmp_path / "a.png")
    wide = "--value_range", -1000, 1000
    with pytest.raises(ValueError, match="no slice is left to train with"):
        made(tmp_path / "a.png", "--out", tmp_path / "set", *LOW_DOSE, *wide)
    assert "a.png: has no value below 0, so it is not in Hounsfield" in capsys.readouterr().out


def test_inverted_and_windowed_dicom_ct(tmp_path):
    scale = {"Modality": "CT", "RescaleSlope": 2, "RescaleIntercept": -1000}
    kinds = {"plain": "MONOCHROME2", "inverted": "MONOCHROME1"}
    shown = {}
    for name, kind in kinds.items():
        dicom_folder(tmp_path / name, "Doe1", [1, 2], PhotometricInterpretation=kind, **scale)
        with pytest.raises(ValueError, match=rf"{name}: slice 0: .*black is 0 HU \(a display win"):
            made(tmp_path / name, "--out", tmp_path / "no", *LOW_DOSE)
        wide = "--value_range", -1000, 1000
        out = tmp_path / f"{name}_set"
        lines = made(tmp_path / name, "--out", out, *LOW_DOSE, *wide)["train"]
        assert {tuple(r["value_range"]) for r in lines} == {(-1000.0, 1000.0)}
        shown[name] = [pixels(out, r[key]) for r in lines for key in ("input_img", "output_img")]
    assert all(map(np.array_equal, shown["plain"], shown["inverted"]))


def test_scans_of_one_patient_stay_together(tmp_path, capsys):
    for i in range(4):
        for end in ("T1", "T2"):
            brain(tmp_path / "ixi" / f"IXI00{i}-Guys-0{i}28-{end}.nii.gz", slices=3)
    parts = made(tmp_path / "ixi", "--out", tmp_path / "set", *NOISE)
    owners = [{r["volume"][:6] for r in parts[p]} for p in PARTS]
    assert [len(names) for names in owners] == [2, 1, 1] and len(set.union(*owners)) == 4
    said = capsys.readouterr().out
    assert "WARNING: names that differ in a contrast alone are one patient: IXI000-Guys-" in said
    assert "and 3 more patients" in said and "--patient" in said
    made(tmp_path / "ixi", "--out", tmp_path / "named", *NOISE, "--patient", r"(IXI\d+)")
    assert "one patient" not in capsys.readouterr().out
    made(tmp_path / "ixi", "--out", tmp_path / "odd", *NOISE, "--patient", r"(IXI00[01])")
    assert "WARNING: --patient finds nothing in 4 files, the first is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "patients"),
    [
        (["IXI-T1/IXI1-Guys-T1", "IXI-T2/IXI1-Guys-T2"], {"IXI/IXI1-Guys"}),
        (["T1/a", "T2/a", "T2/b"], {"a", "b"}),
        (["p1/flair", "p1/t1ce", "p2/flair"], {"p1", "p2"}),
        (["BRATS_01_0000", "BRATS_01_0001", "case_0002"], {"BRATS_01", "case_0002"}),
        (["IXI2-DTI-00", "IXI2-DTI-01", "IXI2-PD"], {"IXI2"}),
        (["carpet", "act", "rat1", "v-T11"], {"carpet", "act", "rat1", "v-T11"}),
        (["x/sub-01_T1w", "sub-02/a", "sub-03.b"], {"sub-01", "sub-02", "sub-03"}),
    ],
)
def test_patients_of_names(tmp_path, files, patients):
    for name in files:
        path = tmp_path / "sub-jects" / f"{name}.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert {s.patient for s in find_sources(tmp_path / "sub-jects")} == patients


def bids_with_dicom(root: Path) -> None:
    """Four subjects, each with a series of slices and a volume."""
    for i in range(1, 5):
        dicom_folder(root / f"sub-0{i}" / "dicom", f"Doe{i}", [0, 1, 2])
        brain(root / f"sub-0{i}" / f"sub-0{i}_T1w.nii.gz", seed=i)


def test_dicom_and_nifti_of_a_subject_stay_together(tmp_path):
    bids_with_dicom(tree := tmp_path / "tree")
    subjects = sorted(tree.iterdir())
    apart = [*(s / "dicom" for s in subjects), *(s / f"{s.name}_T1w.nii.gz" for s in subjects)]
    for number, sources in enumerate(([tree], subjects, apart)):
        out = tmp_path / f"set{number}"
        parts = made(*sources, "--out", out, *NOISE, "--val", 0.25, "--test", 0.25)
        clean = {part: {pixels(out, r["output_img"]).shape for r in parts[part]} for part in parts}
        # Slices of the series are 48 x 48 pixels, those of the volumes 32 x 32.
        assert clean == dict.fromkeys(PARTS, {(48, 48), (32, 32)})
        found = joined([s for source in sources for s in find_sources(source)])
        owners = [{s.patient for s in found if f"sub-0{i}" in str(s.files[0])} for i in range(1, 5)]
        assert [len(patients) for patients in owners] == [1] * 4 == [1] * len(set.union(*owners))
        volumes = [{r["volume"] for r in parts[part]} for part in PARTS]
        assert [len(names) for names in volumes] == [4, 2, 2]
        for source in found:
            others = {s.name for s in found if s.patient == source.patient}
            assert sum(bool(names & others) for names in volumes) == 1
    pattern = "(sub-[0-9]+)"
    assert {s.patient for s in find_sources(tree, pattern)} == {s.name for s in subjects}
    assert not any(s.subjects for s in find_sources(tree, pattern))


def test_a_patient_id_joins_subjects(tmp_path):
    for i, owner in enumerate(["Doe1", "Doe1", "Doe2", "Doe3"], 1):
        series = {"SeriesInstanceUID": f"1.2.{i}"}
        dicom_folder(tmp_path / f"sub-0{i}" / "dicom", owner, [0, 1], **series)
        brain(tmp_path / f"sub-0{i}" / f"sub-0{i}_T1w.nii.gz", seed=i)
    dicom_folder(tmp_path / "sub-04" / "again", "Doe4", [0, 1])
    names = {}
    for source in joined([*find_sources(tmp_path)]):
        names.setdefault(source.patient, set()).add(source.files[0].relative_to(tmp_path).parts[0])
    assert sorted(names.values(), key=min) == [{"sub-01", "sub-02"}, {"sub-03"}, {"sub-04"}]


def test_a_folder_that_looks_like_a_subject_joins_nothing(tmp_path):
    for i in range(1, 4):
        dicom_folder(tmp_path / "sub-jects" / f"x{i}", f"Doe{i}", [0, 1])
    found = [*find_sources(tmp_path / "sub-jects")]
    assert joined(found) == found and len({s.patient for s in found}) == 3


def test_folders_of_contrasts_are_one_patient(tmp_path):
    for name in ("p1_T1", "p1_T2", "p2_T1"):
        (tmp_path / name).mkdir()
        Image.new("L", (16, 16)).save(tmp_path / name / "0.png")
    assert [s.patient for s in find_sources(tmp_path)] == ["p1", "p1", "p2"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["p1/frame01", "p1/frame12", "p2/frame01"], "1 folders"),
        (["p1/a/scan", "p1/b/scan", "p2/a/scan", "p2/b/scan"], "2 folders"),
        (["p1/scan", "p2/scan"], ""),
        (["a", "b"], ""),
        ([f"imagesTr/case{i}" for i in range(13)], ""),
        (["sub-1/ses-1/a", "sub-1/ses-2/b"], ""),
    ],
)
def test_folders_that_may_be_patients_are_told(tmp_path, capsys, names, told):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        nifti(np.ones((4, 4, 4)), tmp_path / f"{name}.nii")
    warn_of_patients(joined([*find_sources(tmp_path)]))
    said = capsys.readouterr().out
    assert said.startswith(f"WARNING: {told} hold several patients by the names") == bool(told)
    assert (f"the first is {tmp_path / 'p1'}, 2 patients" in said) == bool(told)
    if told:
        found = find_sources(tmp_path, r"(p\d)/")
        warn_of_patients(found)
        assert capsys.readouterr().out == ""


def test_dicom_files_without_a_patient_are_told(tmp_path, capsys):
    for i in range(3):
        uids = {"StudyInstanceUID": f"1.7.{i}", "SeriesInstanceUID": f"1.8.{i}"}
        dicom_folder(tmp_path / "mr" / f"p{i % 2}" / f"s{i}", "", [1, 2], **uids)
    made(tmp_path / "mr", "--out", tmp_path / "set", *NOISE)
    said = capsys.readouterr().out
    assert "WARNING: 6 DICOM files without PatientID, the first is" in said
    assert "each StudyInstanceUID counts as a patient" in said
    named = {s.patient for s in find_sources(tmp_path / "mr", r"/(p\d)/")}
    assert named == {"p0", "p1"}


def test_a_pattern_tells_anonymised_patients_apart(tmp_path, capsys):
    root, by_case = tmp_path / "anon", ("--patient", r"case(\d)")
    for i in range(4):
        dicom_folder(root / f"case{i}", "ANONYMOUS", [1, 2], SeriesInstanceUID=f"1.8.{i}")
    with pytest.raises(ValueError, match=r"one patient with several volumes.*apart by --patient"):
        made(root, "--out", tmp_path / "no", *NOISE)
    assert "divides" not in capsys.readouterr().out
    parts = made(root, "--out", tmp_path / "set", *NOISE, *by_case)
    assert [len({r["volume"] for r in parts[p]}) for p in PARTS] == [2, 1, 1]
    assert "ANONYMOUS" not in (said := capsys.readouterr().out)
    assert "WARNING: --patient divides 1 of the PatientIDs, the first among\n  4 patients." in said
    for i in range(4):
        brain(root / f"case{i}" / "t1.nii.gz", slices=3)
    assert sorted(s.patient for s in find_sources(root, by_case[1])) == list("00112233")


def test_a_pattern_that_misses_leaves_the_patient_id(tmp_path, capsys):
    for i in range(3):
        dicom_folder(tmp_path / f"case{i}", f"Roe{i % 2}", [1, 2], SeriesInstanceUID=f"1.8.{i}")
    owners = [s.patient for s in find_sources(tmp_path, r"case(1)")]
    assert owners[0] == owners[2] != owners[1] == "1"
    assert "WARNING: --patient finds nothing in 4 files, the first is" in capsys.readouterr().out


def test_one_series_of_several_is_chosen(tmp_path):
    for name, uid in (("T1 axial", "1.2.3"), ("T2 axial", "1.2.4")):
        fields = {"SeriesInstanceUID": uid, "SeriesDescription": name}
        dicom_folder(tmp_path / "mr" / uid, "Roe", list(range(12)), **fields)
    shares = "--val", 0, "--test", 0.2, "--gap", 2, *NOISE
    with pytest.raises(ValueError, match=r"one patient with several volumes: .*--series"):
        made(tmp_path / "mr", "--out", tmp_path / "both", *shares)
    uncut = made(tmp_path / "mr", "--out", tmp_path / "all", *NOISE, "--val", 0, "--test", 0)
    assert uncut.keys() == {"train"} and len(uncut["train"]) == 24
    for chosen in ("t2", "1.2.4"):
        parts = made(tmp_path / "mr", "--out", tmp_path / chosen, *shares, "--series", chosen)
        assert len({r["volume"] for r in parts["train"]}) == 1


def test_folders_of_images(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for patient in "abcd":
        (tmp_path / "fundus" / patient).mkdir(parents=True)
        for eye in ("left", "right"):
            image = rng.integers(30, 250, (33, 50, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "fundus" / patient / f"{eye}.png")
    (tmp_path / "fundus" / "a" / "broken.png").write_bytes(b"\x89PNG")
    out = tmp_path / "set"
    parts = made(tmp_path / "fundus", "--out", out, "--degrade", "fundus_blur:0.5")
    everything = [r for lines in parts.values() for r in lines]
    assert {r["volume"] for r in everything} <= set("abcd")
    assert [len({r["volume"] for r in parts[p]}) for p in PARTS[1:]] == [1, 1]
    for record in everything:
        assert pixels(out, record["output_img"]).shape == (32, 48, 3)
        assert record["value_range"] == [0.0, 255.0] and record["unit"] == ""
    assert re.search(r"left out: .*broken.png", said := capsys.readouterr().out)
    assert "left out: 1 with errors" in said and len(everything) == 8
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(30, 250, (16, 16), np.uint8)).save(flat / f"p{i // 4}_{i}.png")
    found = made(flat, "--out", tmp_path / "one", *NOISE, "--val", 0, "--gap", 1)
    assert {r["volume"] for r in found["train"]} == {"flat"}
    assert "WARNING: flat is the only volume" in capsys.readouterr().out
    found = made(flat, "--out", tmp_path / "three", *NOISE, "--patient", r"(p\d)_")
    named = [{r["volume"] for r in found[part]} for part in PARTS]
    assert set.union(*named) == {f"flat_p{i}" for i in range(3)}
    assert [len(lines) for lines in found.values()] == [4, 4, 4]


def test_slices_are_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "brain").mkdir()
    for place in range(1, 61):
        image = Image.new("L", (16, 16), 100 + place)
        image.save(tmp_path / "brain" / f"slice_{place}.png")
    out = tmp_path / "set"
    parts = made(tmp_path / "brain", "--out", out, *NOISE, "--gap", 4)
    places = {
        part: sorted(int(pixels(out, r["output_img"]).mean()) - 100 for r in lines)
        for part, lines in parts.items()
    }
    assert places["test"] == list(range(28, 34)) and places["val"] == list(range(18, 24))
    assert places["train"] == [*range(1, 14), *range(38, 61)]
    ordered = ["a/9.png", "a/10.png", "b2/1.png", "b10/01.png", "b10/1.png", "b10/1a.png", "b10/²"]
    assert sorted(map(Path, reversed(ordered)), key=natural) == [*map(Path, ordered)]


def test_colours_are_resampled_as_greys_are(tmp_path):
    rows, columns = np.mgrid[:64, :64]
    ramps = np.stack([40 + 3 * rows, 240 - 3 * columns, 20 + rows + 2 * columns], axis=-1)
    known = {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0}
    known |= {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    whole = "--val", 0, "--test", 0, "--degrade", "blur:0.5"

    def shown(name: str, spacing: list[float], *options: object) -> np.ndarray:
        ds = dataset(rows, PatientID="Roe", PixelSpacing=spacing, **known)
        ds.PixelData = ramps.astype(np.uint8).tobytes()
        path, out = written(ds, tmp_path / f"{name}.dcm"), tmp_path / name
        (record,) = made(path, "--out", out, *whole, *options)["train"]
        return pixels(out, record["output_img"])

    means = ramps.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(shown("coarse", [0.5, 0.5], "--spacing", 1) - means).max() <= 0.5
    # 64 rows of 0.5 mm are 80 of 0.4 mm; a ramp has its value at the middle of every pixel.
    square, y = shown("square", [0.5, 0.4]), (np.arange(80) + 0.5) * 0.4 / 0.5 - 0.5
    expected = np.stack([np.interp(y, rows[:, 0], c) for c in ramps.reshape(64, -1).T], axis=-1)
    assert square.shape == (80, 64, 3)
    assert np.abs(square - expected.reshape(80, 64, 3))[3:-3].max() <= 0.51


def test_pairs_that_training_refuses_are_not_written(tmp_path):
    path, out = brain(tmp_path / "v.nii.gz", slices=3), tmp_path / "set"
    whole = "--val", 0, "--test", 0, "--spacing", 0.125
    many = "--degrade", "downsampling:0.1-0.7"
    fault = r"downsampling:0.7 .*input and target are \(32, 32\) and \(288, 320\).* 1 to 4 times"
    with pytest.raises(ValueError, match=fault):
        made(path, "--out", out, *whole, *many, "--image_rule", 16, 1024, 32)
    assert not out.exists()
    # At most 128 pixels wide and high, both sizes of all pairs are less than 4 times apart.
    made(path, "--out", out, *whole, *many, "--image_rule", 16, 128, 64)
    (group,) = load_mixture(out / "mixture.yaml")
    write_tokenizer(["Words."], tmp_path / "tokenizer")
    rules = group.image_transform_args, group.vit_image_transform_args
    task = RestorationTask(Tokenizer(tmp_path / "tokenizer"), *rules)
    for record in good_records(JsonlRecords(out / "train.jsonl")):
        task.outline(record, out)


def test_one_odd_picture_is_left_out_by_name(tmp_path, capsys):
    (tmp_path / "p").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a", (32, 32)), ("odd", (300, 12)), ("z", (32, 32))):
        Image.fromarray(rng.integers(30, 250, size, np.uint8)).save(tmp_path / "p" / f"{name}.png")
    whole = "--val", 0, "--test", 0
    parts = made(tmp_path / "p", "--out", tmp_path / "set", *NOISE, *whole)
    assert [r["slice"] for r in parts["train"]] == [0, 2]
    said = capsys.readouterr().out
    assert "odd.png: 12x300 pixels are fewer than the stride 16 of --image_rule" in said
    assert "left out: 1 with errors" in said


def test_an_empty_part_is_an_error(tmp_path, capsys):
    folder, out = tmp_path / "bids", tmp_path / "set"
    for i in range(4):
        brain(folder / f"sub-{i}.nii.gz", seed=i, slices=3)
    owners = split_patients({f"sub-{i}" for i in range(4)}, 0.1, 0.1, 0)
    (tested,) = (name for name, part in owners.items() if part == "test")
    (folder / f"{tested}.nii.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"test is empty: .*--test 0"):
        made(folder, "--out", out, *NOISE)
    assert f"left out: {folder / tested}.nii.gz" in capsys.readouterr().out
    asked = made(folder, "--out", tmp_path / "asked", *NOISE, "--val", 0, "--test", 0)
    assert len(asked["train"]) == 3 and len(asked) == 1


def test_sizes_and_bits(tmp_path):
    path = brain(tmp_path / "v.nii.gz", slices=40)
    sized = "--size", 48, 16, "--spacing", 2, "--bits", 8, "--val", 0
    parts = made(path, "--out", tmp_path / "s", *NOISE, *sized)
    image = pixels(tmp_path / "s", parts["train"][0]["output_img"])
    assert image.shape == (48, 16) and image.dtype == np.uint8
    axial = read_scan(path, frame=parts["train"][0]["slice"]).image_01()
    small = axial.reshape(20, 2, 18, 2).mean((1, 3))  # 40 x 36 mm
    assert np.abs(image[14:34] / 255 - small[:, 1:17]).max() < 0.5 / 255 + 1e-6
    assert not image[:14].any() and not image[34:].any()
    odd = np.random.default_rng(0).random((41, 37)).astype(np.float32)
    means = odd[:40, :36].reshape(20, 2, 18, 2).mean((1, 3))
    assert np.abs(make_pairs._resampled(odd, (1.0, 1.0), 2.0) - means).max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--degrade", "mri_noize:0.5"), "did you mean 'mri_noise'"),
        (("--degrade", "mri_noise:0.5-1.5"), "severities are above 0 and at most 1"),
        ((*NOISE, "--patient", "(p"), "'(p' is no pattern: "),
        (("--degrade", "mri_noise"), "is no NAME:SEVERITY or NAME:LOW-HIGH"),
        ((*NOISE, "--axis", "axal"), "invalid choice"),
    ],
)
def test_arguments_that_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        make_pairs.parse(["scan.nii", "--out", "set", *arguments])
    assert message in capsys.readouterr().err


def test_sources_that_give_no_set(tmp_path, patients):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no volume in .*empty"):
        made(tmp_path / "empty", "--out", out, *NOISE)
    with pytest.raises(ValueError, match=r"--degrade mri_noise stands twice"):
        made(patients, "--out", out, *NOISE, *NOISE)
    with pytest.raises(ValueError, match=r"--texts blur is for none of --degrade mri_noise"):
        made(patients, "--out", out, *NOISE, "--texts", "blur", "a", "b")
    with pytest.raises(ValueError, match=r"nowhere.dcm"):
        made(tmp_path / "nowhere.dcm", "--out", out, *NOISE)
    with pytest.raises(ValueError, match=r"--test_slices is for a single volume"):
        made(patients, "--out", out, *NOISE, "--test_slices", 1, 2)
    with pytest.raises(ValueError, match=r"no slice is left to train with.*nearly black"):
        made(patients, "--out", out, *NOISE, "--value_range", 2000, 3000)
    with pytest.raises(ValueError, match="several volumes are called sub-2_T1w"):
        twice = patients / "sub-2_T1w.nii.gz"
        made(twice, twice, "--out", out, *NOISE)
    with pytest.raises(ValueError, match=r"no slice is left to train with.*'with errors': 36"):
        made(patients, "--out", out, *NOISE, "--image_rule", 64, 128, 64)
    with pytest.raises(ValueError, match=r"histology_stain: needs a colour image"):
        made(patients, "--out", out, "--degrade", "histology_stain:0.5")


def test_every_task_has_an_instruction():
    tasks = {entry.task for entry in make_pairs.DEGRADATIONS.values()}
    assert tasks == make_pairs.INSTRUCTIONS.keys()


def test_the_demo_makes_the_pairs_that_its_checkpoint_knows():
    """Its command repeats values of the recipe; they must not drift apart."""
    script = (ROOT / "scripts/tiny/demo.sh").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"make_pairs\.py (.*)", script)
    args = make_pairs.parse(shlex.split(command))
    held_out = tiny.HELD_OUT_SLICES_MM
    assert args.test_slices == [held_out.start, held_out.stop]
    assert args.size == [tiny.SLICE_HEIGHT, tiny.SLICE_WIDTH]
    rules = [ResizeRule(**rule) for rule in recipe.RULES.values()]
    for rule, sizes in zip(rules, (args.image_rule, args.vit_rule), strict=True):
        assert [rule.image_stride, rule.max_image_size, rule.min_image_size] == sizes
    noise, resolution = (
        make_pairs.DEGRADATIONS[name].parameters(low) for name, low, high in args.degrade
    )
    assert noise["sigma"] == pytest.approx(recipe.TEST_SIGMA)
    assert resolution["factor"] == recipe.TEST_FACTOR
    assert args.texts == [
        ["mri_noise", recipe.INSTRUCTIONS["denoising"], recipe.NOISE[recipe.TEST_SIGMA]],
        ["downsampling", recipe.INSTRUCTIONS["super-resolution"], recipe.BLUR[recipe.TEST_FACTOR]],
    ]
    trained = tiny.TRAIN_SLICES_MM
    assert (
        trained[0].stop <= held_out.start - args.gap
        and held_out.stop + args.gap <= trained[1].start
    )


def test_the_page_shows_what_the_commands_print(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text()
    blocks = re.findall(r"```\n\$ python scripts/tools/make_pairs\.py (.*)\n([^`]*)```", page)
    assert [shlex.split(command)[0] for command, _ in blocks] == ["brain.nii.gz", "dicom"]
    shutil.copy(tiny.ICBM152, tmp_path / "brain.nii.gz")
    shutil.copytree(shipped("DICOMDIR").parent, tmp_path / "dicom")
    run = sys.executable, "-u", ROOT / "scripts" / "tools" / "make_pairs.py"
    for command, printed in blocks:
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run([*run, *shlex.split(command)], cwd=tmp_path, check=False, **both)
        assert (done.returncode, done.stdout) == (0, printed)
