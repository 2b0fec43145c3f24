"""Files of Detectron2's model zoo and of ImageNet: read safely on both engines, names matched, frozen as they are."""

from __future__ import annotations

import errno
import http.server
import os
import pickle
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2_frozen import add_frozen_config
from d2_frozen.engine import FrozenCheckpointer
from d2_frozen.engine.checkpoint import UnsafePickleError
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

ZOO = Path(__file__).resolve().parents[3] / "configs" / "zoo"
# ResNet-50 with narrow layers and small heads, on CPU.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 4,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
}
# The zoo's backbone, frozen, under this project's BiFPN.
FROZEN = {
    "MODEL.META_ARCHITECTURE": "FrozenRCNN",
    "MODEL.BACKBONE.NAME": "build_frozen_backbone",
    "MODEL.FROZEN.BOTTOM_UP": "build_resnet_backbone",
    "MODEL.FPN.NORM": "GN",
    "MODEL.BIFPN.NUM_LAYERS": 1,
}


def small_config(options: Mapping[str, object] | None = None) -> CfgNode:
    cfg = add_frozen_config(get_cfg())
    cfg.merge_from_file(str(ZOO / "mask_rcnn_R_50_FPN_3x.yaml"))
    cfg.merge_from_list([item for pair in {**SMALL, **(options or {})}.items() for item in pair])
    return cfg


def write_pickle(path: Path, weights: dict[str, np.ndarray], **extra: object) -> str:
    path.write_bytes(pickle.dumps({"model": weights, **extra}, protocol=2))
    return str(path)


def weights_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Every tensor its own values, norm statistics included."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.startswith("pixel"):
                tensor.copy_(0.5 + 0.1 * torch.rand(tensor.shape))
    return model


class _RunsCode:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth", "evil.pyth", "evil"])
def test_hostile_file_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    content = {
        "model": {"weight": torch.zeros(3, 2)},
        "__author__": "x",
        "extra": _RunsCode(tmp_path / "ran"),
    }
    path = tmp_path / name
    if name.endswith(".pkl"):
        content["model"] = {"weight": np.zeros((3, 2))}
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(UnsafePickleError, match=rf"{name}.*system"):
        FrozenCheckpointer(torch.nn.Linear(2, 3)).load(str(path))
    assert not (tmp_path / "ran").exists()


def test_zoo_file_loads_every_tensor(tmp_path: Path) -> None:
    source, model = randomised(build_model(small_config())), build_model(small_config())
    path = write_pickle(tmp_path / "model_final.pkl", weights_of(source), __author__="Detectron2 Model Zoo")
    FrozenCheckpointer(model, strict=True).load(path)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("asked", ["in the file", "in the path", "in the path, pth"])
def test_names_are_matched_by_their_ends(tmp_path: Path, asked: str) -> None:
    """A ResNet saved alone ("res2.0.conv1.weight") loads into the detector's bottom-up network."""
    cfg = small_config()
    model, source = build_model(cfg), randomised(build_model(cfg)).backbone.bottom_up
    weights = weights_of(source)
    if asked == "in the path, pth":
        torch.save({"model": source.state_dict()}, tmp_path / "resnet.pth")
        path = f"{tmp_path}/resnet.pth?matching_heuristics=True"
    elif asked == "in the path":
        path = write_pickle(tmp_path / "r.pkl", weights, __author__="test") + "?matching_heuristics=True"
    else:
        path = write_pickle(tmp_path / "r.pkl", weights, __author__="test", matching_heuristics=True)
    FrozenCheckpointer(model).load(path)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.backbone.bottom_up.state_dict()[name], tensor), name


def test_unknown_request_in_the_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matching_heuristics=True"):
        FrozenCheckpointer(torch.nn.Linear(1, 1)).load(f"{tmp_path}/w.pkl?heuristics=1")


def msra_weights(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """A ResNet's weights as MSRA's R-50.pkl names them: normalisation is scale and bias, without statistics."""
    parts = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    blobs: dict[str, np.ndarray] = {}
    for name, value in weights_of(network).items():
        *place, leaf = name.split(".")
        norm = place[-1] == "norm"
        layer = place[:-1] if norm else place
        if layer[0] == "stem":
            stem = "res_conv1" if norm else "conv1"
        else:
            stem = f"{layer[0]}_{layer[1]}_{parts[layer[2]]}"
        if leaf in ("weight", "bias"):
            blobs[f"{stem}_bn_{'s' if leaf == 'weight' else 'b'}" if norm else f"{stem}_w"] = value
    return blobs


def test_msra_names_load_into_a_frozen_backbone_and_leave_again_by_the_source(tmp_path: Path) -> None:
    """Python 2's R-50.pkl: {"blobs": {"conv1_w", "res_conv1_bn_s", "res2_0_branch2a_w", ...}} of byte strings."""
    cfg = small_config(FROZEN)
    source = randomised(build_model(cfg)).backbone.bottom_up.inner
    blobs = {**msra_weights(source), "pred_w": np.zeros((10, 4)), "conv1_w_momentum": np.zeros(3)}
    path = tmp_path / "R-50.pkl"
    # Protocol 1 with array content as text is what Python 2 wrote; latin1 is how it must be read.
    path.write_bytes(pickle.dumps({"blobs": blobs}, protocol=1))

    model = build_model(cfg)
    checkpointer = FrozenCheckpointer(model, str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    checkpointer.load(str(path))
    loaded = model.backbone.bottom_up.state_dict()
    for name, tensor in source.state_dict().items():
        if "running" not in name:
            assert torch.equal(loaded[name], tensor), name
    checkpointer.save("heads")
    content = torch.load(tmp_path / "out" / "heads.pth", weights_only=True)
    assert not [name for name in content["model"] if name.startswith("backbone.bottom_up.")]
    assert content["frozen"][0]["source"] == str(path) and content["frozen"][0]["name"] == "ResNet"

    again = build_model(cfg)
    FrozenCheckpointer(again, strict=True).load(str(tmp_path / "out" / "heads.pth"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_heads_only_file_leaves_frozen_norm_statistics_alone(tmp_path: Path) -> None:
    """FrozenBatchNorm2d takes a file without its statistics for one of old, and would reset them."""
    model = randomised(build_model(small_config(FROZEN)))
    FrozenCheckpointer(model, str(tmp_path)).save("heads")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    FrozenCheckpointer(model, strict=True).load(str(tmp_path / "heads.pth"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which 127.0.0.1 serves it; iopath's cache is empty."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))

    def handler(*args: object) -> _Quiet:
        return _Quiet(*args, directory=str(folder))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_weights_from_the_net_are_fetched_once(web: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = web
    source, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    (folder / "zoo").mkdir()
    write_pickle(folder / "zoo" / "linear.pkl", weights_of(source), __author__="test")
    FrozenCheckpointer(model).load(f"{address}/zoo/linear.pkl")
    assert torch.equal(model.weight, source.weight)
    assert (tmp_path / "cache" / "zoo" / "linear.pkl").is_file()
    (folder / "zoo" / "linear.pkl").unlink()
    again = torch.nn.Linear(2, 3)
    FrozenCheckpointer(again).load(f"{address}/zoo/linear.pkl")
    assert torch.equal(again.weight, source.weight)


def test_detectron2_addresses_lead_to_its_store(
    web: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detectron2.utils import file_io

    folder, address = web
    monkeypatch.setattr(file_io.Detectron2Handler, "S3_DETECTRON2_PREFIX", f"{address}/")
    source, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    write_pickle(folder / "linear.pkl", weights_of(source), __author__="test")
    FrozenCheckpointer(model).load("detectron2://linear.pkl")
    assert torch.equal(model.weight, source.weight)


def test_without_a_connection_the_error_says_what_to_put_where(web: tuple[Path, str], tmp_path: Path) -> None:
    _, address = web
    with pytest.raises(FileNotFoundError) as error:
        FrozenCheckpointer(torch.nn.Linear(1, 1)).load(f"{address}/zoo/gone.pkl?matching_heuristics=True")
    message = str(error.value)
    assert f"{address}/zoo/gone.pkl" in message and "404" in message and "MODEL.WEIGHTS" in message
    cached = tmp_path / "cache" / "zoo" / "gone.pkl"
    assert str(cached) in message
    # The advice works.
    source, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    write_pickle(cached, weights_of(source), __author__="test")
    FrozenCheckpointer(model).load(f"{address}/zoo/gone.pkl")
    assert torch.equal(model.weight, source.weight)


def test_offline_error_resolves_detectron2_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from detectron2.utils import file_io

    # A port on which nothing listens.
    monkeypatch.setattr(file_io.Detectron2Handler, "S3_DETECTRON2_PREFIX", "http://127.0.0.1:9/")
    with pytest.raises(FileNotFoundError, match=r"detectron2://a/b\.pkl \(http://127\.0\.0\.1:9/a/b\.pkl\)"):
        FrozenCheckpointer(torch.nn.Linear(1, 1)).load("detectron2://a/b.pkl")


def test_a_cache_on_a_file_system_without_locks_does_not_stop_a_download(
    web: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Home folders on Lustre: the download goes elsewhere; what was put into the cache by hand is read where it is."""
    fcntl = pytest.importorskip("fcntl")
    flock = fcntl.flock

    def without_locks(file: Any, operation: int) -> None:
        handle = file if isinstance(file, int) else file.fileno()
        if str(tmp_path / "cache") in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSYS, "Function not implemented")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", without_locks)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder, address = web
    source, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    write_pickle(folder / "linear.pkl", weights_of(source), __author__="test")
    FrozenCheckpointer(model).load(f"{address}/linear.pkl")
    assert torch.equal(model.weight, source.weight)
    assert (tmp_path / "temporary" / "iopath_cache" / "linear.pkl").is_file()
    assert f"{tmp_path}/cache, where downloads are kept, is on a file system without locks" in caplog.text
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    write_pickle(tmp_path / "cache" / "by_hand.pkl", weights_of(source), __author__="test")
    FrozenCheckpointer(torch.nn.Linear(2, 3)).load(f"{address}/by_hand.pkl")
