"""Weight files: what fits is loaded to the last bit, what does not is named."""

import pytest
import torch

from d2_frozen.backbone import create_timm_backbone, load_weights, read_weights, save_weights
from d2_frozen.backbone.weights import SHIPPED_DIR
from detectron2.utils.file_io import PathManager

NAME = "convnext_atto"


def _state(seed=0):
    torch.manual_seed(seed)
    return create_timm_backbone(NAME).network.state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.bottom_up.network."])
def test_round_trip(tmp_path, suffix, prefix):
    state = {f"{prefix}{k}": v for k, v in _state().items()}
    path = tmp_path / f"weights{suffix}"
    save_weights(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    loaded = create_timm_backbone(NAME, str(path)).network.state_dict()
    assert all(torch.equal(value, state[f"{prefix}{key}"]) for key, value in loaded.items())


def test_a_file_is_readable_for_others(tmp_path):
    """safetensors' writer makes files for their owner alone."""
    save_weights(_state(), tmp_path / "w.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_half_precision_files_arrive_as_float32(tmp_path):
    save_weights(_state(), tmp_path / "half.safetensors", half=True, metadata={"seed": "0"})
    tensors = read_weights(str(tmp_path / "half.safetensors"))
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert [file.name for file in tmp_path.iterdir()] == ["half.safetensors"]


def test_a_classifier_in_the_file_is_left_out(tmp_path):
    state = {**_state(), "head.fc.weight": torch.ones(5, 320), "head.fc.bias": torch.ones(5)}
    save_weights(state, tmp_path / "w.safetensors")
    assert (
        "head.fc.weight"
        not in create_timm_backbone(NAME, str(tmp_path / "w.safetensors")).network.state_dict()
    )


def test_misfits_are_listed_by_name(tmp_path):
    state = _state()
    first, second = list(state)[:2]
    del state[first]
    state[second] = torch.ones(3)
    state["another.weight"] = torch.ones(1)
    save_weights(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError) as error:
        create_timm_backbone(NAME, str(tmp_path / "w.safetensors"))
    for fact in (
        f"1 missing: {first}",
        "1 unexpected: another.weight",
        f"{second} is (3,)",
        "MODEL.TIMM.NAME",
    ):
        assert fact in str(error.value)


def test_files_that_are_not_there_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="MODEL.TIMM.PRETRAINED"):
        create_timm_backbone(NAME, str(tmp_path / "none.safetensors"))
    with pytest.raises(FileNotFoundError, match="swinv2_pico_fdsl.safetensors"):
        read_weights("d2_frozen://none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    (tmp_path / "cut.pth").write_bytes(b"no tensors")
    for name in ("cut.safetensors", "cut.pth"):
        with pytest.raises(ValueError, match=name):
            read_weights(str(tmp_path / name))
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="no tensors"):
        read_weights(str(tmp_path / "empty.pth"))


def test_files_that_would_run_code_are_refused(tmp_path):
    torch.save({"model": pytest.raises}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="weights_only"):
        read_weights(str(tmp_path / "code.pth"))


def test_position_tables_of_old_files_are_no_surprise():
    network = create_timm_backbone("swinv2_pico_window8_256").network
    state = {**network.state_dict(), "layers.0.blocks.0.attn.relative_position_index": torch.zeros(64, 64)}
    load_weights(network, state, source="old file")


def test_shipped_weights_fit_and_are_small():
    file = "d2_frozen://swinv2_pico_fdsl.safetensors"
    assert PathManager.exists(file)
    assert (SHIPPED_DIR / "swinv2_pico_fdsl.safetensors").stat().st_size <= 6e6
    pretrained = create_timm_backbone("swinv2_pico_window8_256", file)
    assert all(torch.isfinite(p).all() for p in pretrained.parameters())
    hub = create_timm_backbone("swinv2_pico_window8_256", "hub")
    assert all(torch.equal(a, b) for a, b in zip(pretrained.parameters(), hub.parameters()))
