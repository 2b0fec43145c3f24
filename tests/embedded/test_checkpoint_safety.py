"""Files of weights that are hostile, cut off or killed while being written."""

from __future__ import annotations

import collections
import io
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.atomic import write_atomically
from detectron2.checkpoint.reading import UnsafePickleError, load_pickle


class _Call:
    """Pickles as the call ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _load(path):
    return DetectionCheckpointer(nn.Linear(2, 3)).load(str(path))


def _weights():
    return {name: tensor.numpy() for name, tensor in nn.Linear(2, 3).state_dict().items()}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_load_in_every_protocol(tmp_path, protocol):
    extra = {"set": {1, 2}, "scalar": np.float64(0.5), "bytes": b"\xff\x00", "text": "é", "none": None}
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": _weights(), "__author__": "test", **extra}, protocol))
    rest = _load(path)
    assert {name: rest[name] for name in extra} == extra


def test_array_layouts_survive(tmp_path):
    """Column order, empty and shared arrays, text, and the metadata of a state dict; bytes come in native
    order.
    """
    state = collections.OrderedDict(swapped=np.arange(6, dtype=">f4").reshape(2, 3))
    state._metadata = {"version": 3}
    shared = np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2)
    content = {
        "state": state,
        "first": shared,
        "second": shared,
        "empty": np.zeros((0, 3)),
        "text": np.array("é"),
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        loaded = load_pickle(io.BytesIO(pickle.dumps(content, protocol)), "file")
        assert loaded["first"] is loaded["second"]
        assert loaded["state"]._metadata == {"version": 3}
        loaded["swapped"], content["swapped"] = loaded["state"]["swapped"], state["swapped"]
        for name in ("swapped", "first", "empty", "text"):
            assert (
                loaded[name].dtype == content[name].dtype.newbyteorder("=") and loaded[name].flags.writeable
            )
            assert np.array_equal(loaded[name], content[name])
        del content["swapped"]


def test_forged_array_state_is_refused():
    """numpy's own reader would make float32 hold Python objects, or read beyond the data."""
    forged_dtype = b"cnumpy\ndtype\n(Vf4\nI00\nI01\ntR(I3\nV<\nNNNI-1\nI-1\nI63\ntb."
    assert np.zeros(2, np.float32).dtype.hasobject is False
    load_pickle(io.BytesIO(forged_dtype), "file")
    assert np.zeros(2, np.float32).dtype.hasobject is False
    forged_array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"
        b"(I1\n(I9\ntcnumpy\ndtype\n(Vf4\ntRI00\nVxy\ntb."
    )
    with pytest.raises(ValueError, match="2 bytes for 9 values"):
        load_pickle(io.BytesIO(forged_array), "file")
    for kind in ("O", "V8", "f4,O", "M8[s]"):
        with pytest.raises(UnsafePickleError, match="array of type"):
            load_pickle(io.BytesIO(b"cnumpy\ndtype\n(V%s\ntR." % kind.encode()), "file")


def _hostile(witness):
    import codecs
    import functools

    return {
        "posix.system": _Call(os.system, f"touch {witness}"),
        "builtins.eval": _Call(eval, f"open({str(witness)!r}, 'w')"),
        "builtins.getattr": _Call(getattr, {}, "update"),
        "functools.partial": _Call(functools.partial, print),
        "codecs.decode": _Call(codecs.decode, b"x", "latin1"),
        "torch": torch.nn.Linear(1, 1),
    }


@pytest.mark.parametrize("name", sorted(_hostile("")))
def test_pickles_that_ask_for_code_are_refused_and_not_run(tmp_path, name):
    witness = tmp_path / "it_ran"
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": _weights(), "__author__": "x", "extra": _hostile(witness)[name]}))
    with pytest.raises(UnsafePickleError) as error:
        _load(path)
    assert str(path) in str(error.value)
    assert name.split(".")[-1] in str(error.value)
    assert not witness.exists()


def test_code_hidden_in_containers_or_arrays_is_refused(tmp_path):
    """The call may sit anywhere: deep inside, in a metadata, as a key, as an element of an object array."""
    witness = tmp_path / "it_ran"
    call = _Call(os.system, f"touch {witness}")
    with_metadata = collections.OrderedDict()
    with_metadata._metadata = call
    objects = np.empty(1, dtype=object)
    objects[0] = call
    structured = np.zeros(1, dtype=[("x", "O")])
    for hidden in ([[{"a": (call,)}]], with_metadata, {call: 1}, {frozenset([call])}, objects, structured):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path = tmp_path / "weights.pkl"
            path.write_bytes(
                pickle.dumps({"model": _weights(), "__author__": "x", "extra": hidden}, protocol)
            )
            with pytest.raises(UnsafePickleError, match="weights.pkl"):
                _load(path)
    assert not witness.exists()


_FLOAT32 = b"cnumpy\ndtype\n(Vf4\ntR"
_EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (b"cbuiltins\nbytearray\n(I1000000000000\ntR.", "makes bytes of a int"),
        (b"c__builtin__\nbytes\n(I1000000000000\ntR.", "makes bytes of a int"),
        (b"\x80\x05\x96" + (10**12).to_bytes(8, "little") + b"xy.", "1000000000000 bytes"),
        (b"\x80\x04\x8e" + (10**12).to_bytes(8, "little") + b"xy.", "1000000000000 bytes"),
        (b"\x80\x02\x8b\xff\xff\xff\x7fxy.", "2147483647 bytes"),
        (_EMPTY + b"(I1\n((I0\ntI10000000000\nt" + _FLOAT32 + b"I00\nVxy\ntb.", "shape"),
        (_EMPTY + b"(I1\n(I-1\nI-4\nt" + _FLOAT32 + b"I00\nVxy\ntb.", "shape"),
        (_EMPTY + b"(I1\n(I1000000000000\ntcnumpy\ndtype\n(VS0\ntRI00\nV\ntb.", "far more"),
        # One array, its rows as a tuple, another content for the array: the rows would point to freed memory.
        (_EMPTY + 2 * (b"(I1\n(I2\nI1\nt" + _FLOAT32 + b"I00\nVabcdefgh\ntb") + b".", "twice"),
        (_EMPTY + b"p1\n0cbuiltins\ntuple\n(g1\ntR.", "makes a tuple of a ndarray"),
        (b"cbuiltins\ngetattr\n(cbuiltins\ndict\nVupdate\ntR.", "builtins.getattr"),
        (b"ccollections\nOrderedDict.fromkeys\n(tR.", "OrderedDict.fromkeys"),
        (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.", "OrderedDict.fromkeys"),
        (b"(ios\nsystem\nVtouch it_ran\n.", "os.system"),
        (b"(cos\nsystem\nVtouch it_ran\no.", "os.system"),
        (b"ccollections\nOrderedDict\n(tR}Vitems\ncbuiltins\ndict\nsb.", "state of a OrderedDict"),
        (b"\x80\x02\x82\x01.", "extension 1"),
        (b"Psomewhere\n.", "'somewhere'"),
    ],
)  # fmt: skip
def test_hand_written_programs_are_refused(program, said):
    """Opcodes that no honest pickler writes like this: huge allocations, tricks with attributes and memory."""
    with pytest.raises((UnsafePickleError, ValueError), match=said) as error:
        load_pickle(io.BytesIO(program), "evil.pkl")
    assert "evil.pkl" in str(error.value) and len(str(error.value)) < 1000


def test_copying_one_thing_again_and_again_is_refused():
    """A list of 10^4 copied 10^4 times: 100 kB that would become 800 MB."""
    program = b"(" + b"I1\n" * 10**4 + b"lp1\n0(" + b"cbuiltins\nlist\n(g1\ntR" * 10**4 + b"l."
    with pytest.raises(UnsafePickleError, match="far more of its content"):
        load_pickle(io.BytesIO(program), "evil.pkl")


def test_messages_do_not_unfold_nested_lists():
    """Forty lists, each holding the former twice, would print as 2^40 brackets."""
    program = b"]p0\n" + b"(g0\ng0\nlp0\n" * 40
    for use in (b"cnumpy\ndtype\n(g0\ntR.", b"c_codecs\nencode\n(Vx\ng0\ntR.", b"g0\nQ."):
        with pytest.raises(UnsafePickleError, match="a list"):
            load_pickle(io.BytesIO(program + use), "evil.pkl")


def test_model_that_is_no_dictionary_is_named(tmp_path):
    path = tmp_path / "odd.pkl"
    path.write_bytes(pickle.dumps({"model": [1], "__author__": "x"}))
    with pytest.raises(AttributeError, match=r"odd\.pkl holds a list"):
        _load(path)


def test_text_codec_other_than_latin1_is_refused(tmp_path):
    """The stand-in for _codecs.encode must not become a way to import codec modules."""
    path = tmp_path / "weights.pkl"
    path.write_bytes(b"c_codecs\nencode\n(Vx\nVrot13\ntR.")
    with pytest.raises((pickle.UnpicklingError, ValueError), match="rot13"):
        _load(path)


def test_pth_that_asks_for_code_is_refused_and_not_run(tmp_path):
    witness = tmp_path / "it_ran"
    path = tmp_path / "weights.pth"
    torch.save({"model": nn.Linear(2, 3).state_dict(), "extra": _Call(os.system, f"touch {witness}")}, path)
    with pytest.raises(pickle.UnpicklingError, match=r"weights\.pth.*system"):
        _load(path)
    assert not witness.exists()


def _save_as(path):
    state = nn.Linear(2, 3).state_dict()
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": _weights(), "__author__": "x"}))
    elif path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=path.stem != "legacy")


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("name", ["w.pkl", "w.safetensors", "w.pth", "legacy.pth"])
def test_cut_off_files_are_named(tmp_path, name, keep):
    path = tmp_path / name
    _save_as(path)
    _load(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=f"{path.stem}.*cut off"):
        _load(path)


def test_files_without_sense_are_named(tmp_path):
    for suffix in (".pkl", ".safetensors", ".pth"):
        path = tmp_path / f"noise{suffix}"
        path.write_bytes(bytes(np.random.RandomState(0).randint(0, 256, 500, dtype=np.uint8)))
        with pytest.raises((ValueError, pickle.UnpicklingError), match="noise"):
            _load(path)


def test_files_of_another_kind_are_named(tmp_path):
    path = tmp_path / "metrics.pth"
    path.write_text('{"iteration": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.pth is no file of weights: it starts with .*iteration"):
        _load(path)


def test_missing_file_is_named_with_advice():
    with pytest.raises(AssertionError, match=r"nowhere/w\.pth.*MODEL\.WEIGHTS"):
        _load("nowhere/w.pth")


def test_safetensors_load(tmp_path):
    from safetensors.torch import save_file

    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    DetectionCheckpointer(target).load(str(tmp_path / "w.safetensors"))
    assert torch.equal(source.weight, target.weight)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail_half_way(stream):
        stream.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(str(path), fail_half_way)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_saved_files_have_the_usual_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    DetectionCheckpointer(nn.Linear(2, 3), str(tmp_path)).save("model")
    assert (tmp_path / "model.pth").stat().st_mode == plain.stat().st_mode


def _half_of_a_file(content, stream):
    stream.write(b"PK half of a file")
    stream.flush()
    _die()


def _die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("moment", "target", "replacement", "left"),
    [
        ("while writing", torch, {"save": _half_of_a_file}, 1),
        ("before the rename", os, {"replace": _die}, 1),
        ("before the tag", DetectionCheckpointer, {"tag_last_checkpoint": _die}, 2),
    ],
)
def test_kill_while_saving_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path, moment, target, replacement, left
):
    """A child process is killed by SIGKILL at a chosen moment of its second save."""
    checkpointer = DetectionCheckpointer(nn.Linear(2, 3), str(tmp_path))
    checkpointer.save("model", iteration=1)
    child = os.fork()
    if child == 0:
        try:
            for name, value in replacement.items():
                setattr(target, name, value)
            checkpointer.save("model", iteration=2)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, moment
    rest = DetectionCheckpointer(nn.Linear(2, 3), str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == left
