"""An unusable model or file fails with its name and with an alternative that works."""

from pathlib import Path

import pytest
import ultralytics
from ultralytics import YOLO

from kdcache.errors import KDCacheError, ModelError
from kdcache.models import build_model, trusting
from kdcache.models.export import export_model
from kdcache.run_folder import RunModel
from kdcache.teacher import load_teacher

MODELS = {"yolo26n": "detect", "yolo26n-pose": "pose", "yolo26s-obb": "obb", "yolo26n-seg": "segment"}


@pytest.mark.parametrize("name", MODELS)
def test_other_tasks_are_named(name: str, tmp_path: Path) -> None:
    YOLO(f"{name}.yaml").save(tmp_path / f"{name}.pt")
    size = name[6]
    for spec in (name, f"{tmp_path}/{name}.pt"):
        with trusting(), pytest.raises(ModelError, match=f"its task is {MODELS[name]}") as raised:
            build_model(f"ultralytics:{spec}", 3)
        assert f"ultralytics:yolo26{size}-sem" in raised.value.fix


def test_a_checkpoint_needs_trust_and_must_be_there(tmp_path: Path) -> None:
    YOLO("yolo26n-sem.yaml").save(tmp_path / "best.pt")
    with pytest.raises(ModelError, match="unpickling can run code") as raised:
        load_teacher(f"ultralytics:{tmp_path}/best.pt", ["a", "b"])
    assert "--trust" in raised.value.fix
    with trusting(), pytest.raises(ModelError, match="Weights not found"):
        load_teacher(f"ultralytics:{tmp_path}/nothing.pt", ["a", "b"])
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with trusting(), pytest.raises(ModelError, match=r"Cannot read .*broken\.pt with ultralytics"):
        load_teacher(f"ultralytics:{tmp_path}/broken.pt", ["a", "b"])


def test_names_and_versions_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="Unknown model ultralytics:yolo26n-semantic") as raised:
        build_model("ultralytics:yolo26n-semantic", 3)
    assert "yolo26n-sem" in raised.value.fix
    monkeypatch.setattr(ultralytics, "__version__", "8.3.9")
    with pytest.raises(ModelError, match=r"Cannot use ultralytics 8\.3\.9") as raised:
        build_model("ultralytics:yolo26n-sem", 3)
    assert "pip install" in raised.value.fix


def test_sizes_are_multiples_of_32() -> None:
    with pytest.raises(KDCacheError, match="multiples of 32"):
        build_model("ultralytics:yolo26n-sem", 3).check_size((100, 128))


def test_models_of_others_are_no_checkpoint(tmp_path: Path) -> None:
    model = build_model("kdcache:tiny", 2)
    black = ((0, 0, 0), (1, 1, 1))
    about = RunModel(spec=model.spec, class_names=("a", "b"), class_colours=black, size=(64, 64), mean=model.mean,
                     std=model.std)  # fmt: skip
    with pytest.raises(ModelError, match="is no network of ultralytics") as raised:
        export_model(model, about, tmp_path / "best.pt")
    assert ".onnx" in raised.value.fix
    assert not list(tmp_path.iterdir())
