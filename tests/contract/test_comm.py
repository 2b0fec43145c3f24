"""What processes tell each other; alone, and with two of them over gloo."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from detectron2.utils import comm


def test_alone():
    assert (comm.get_world_size(), comm.get_rank(), comm.get_local_rank(), comm.get_local_size()) == (
        1,
        0,
        0,
        1,
    )
    assert comm.is_main_process()
    assert comm.all_gather("x") == comm.gather("x") == ["x"]
    assert comm.reduce_dict({"a": torch.tensor(2.0)}) == {"a": torch.tensor(2.0)}
    comm.synchronize()


def _two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    comm.create_local_process_group(1)
    losses = {"b": torch.tensor(float(rank)), "a": torch.tensor(10.0 * rank)}
    facts = {
        "where": (comm.get_rank(), comm.get_world_size(), comm.get_local_rank(), comm.get_local_size()),
        "main": comm.is_main_process(),
        "all": comm.all_gather({"rank": rank, "text": "x" * 1000 * rank})
        == [
            {"rank": 0, "text": ""},
            {"rank": 1, "text": "x" * 1000},
        ],
        "gathered": comm.gather(rank, dst=1),
        "reduced": {key: value.item() for key, value in comm.reduce_dict(losses).items()},
        "seed": comm.shared_random_seed(),
    }
    comm.synchronize()
    torch.save(facts, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes(tmp_path):
    torch.multiprocessing.start_processes(_two, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert (first["where"], second["where"]) == ((0, 2, 0, 1), (1, 2, 0, 1))
    assert (first["main"], second["main"]) == (True, False)
    assert first["all"] and second["all"]
    assert (first["gathered"], second["gathered"]) == ([], [0, 1])
    assert first["reduced"] == {"a": 5.0, "b": 0.5}
    assert first["seed"] == second["seed"]
