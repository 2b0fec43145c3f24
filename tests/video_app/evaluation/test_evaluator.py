"""Top-k against an independent computation, and every way in which a video has no rank."""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from video_app.evaluation import TopKEvaluator
from video_app.evaluation.evaluator import class_table

Register = Callable[[int], str]


@pytest.fixture
def register() -> Iterator[Register]:
    """``register(K)`` -> the name of a dataset of K classes."""
    names: list[str] = []

    def make(classes: int) -> str:
        name = f"t_top_k_{len(names)}"
        DatasetCatalog.register(name, lambda: [])
        MetadataCatalog.get(name).classes = [f"class {k}" for k in range(classes)]
        names.append(name)
        return name

    yield make
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def video(number: int, label: int, **more: object) -> dict:
    return {"file_name": f"/videos/{number}.mp4", "label": label, "video_id": number, **more}


def result_of(evaluator: TopKEvaluator, labels: list[int], scores: list) -> dict[str, float]:
    evaluator.reset()
    for number, (label, row) in enumerate(zip(labels, scores)):
        found = None if row is None else torch.as_tensor(row, dtype=torch.float32)
        evaluator.process([video(number, label)], [{"scores": found}])
    results = evaluator.evaluate()
    assert results is not None
    return results["video"]


def test_metrics_equal_an_independent_computation(register: Register) -> None:
    """By sorting rows of numpy; class 7 has no video, and is not in the mean over classes."""
    random = np.random.default_rng(0)
    labels = random.choice([0, 1, 2, 3, 4, 5, 6, 8], size=60)
    scores = random.dirichlet(np.ones(9), size=60).astype(np.float32)
    got = result_of(TopKEvaluator(register(9)), labels.tolist(), list(scores))
    order = np.argsort(-scores, axis=1)
    right = order[:, 0] == labels
    assert got["top1"] == pytest.approx(100 * right.mean())
    assert got["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(axis=1).mean())
    means = [right[labels == k].mean() for k in sorted(set(labels.tolist()))]
    assert len(means) == 8 and got["mean_class_acc"] == pytest.approx(100 * np.mean(means))
    assert got["bad"] == 0 and not any(math.isnan(value) for value in got.values())


def test_equal_scores_are_ranked_by_class(register: Register) -> None:
    """A model that says nothing is right on class 0 alone, and has classes 0 to 4 among its five best."""
    scores = [[0.125] * 8] * 8
    got = result_of(TopKEvaluator(register(8)), list(range(8)), scores)
    assert (got["top1"], got["top5"]) == (pytest.approx(12.5), pytest.approx(62.5))


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_with_five_classes_or_fewer_every_readable_video_is_in_the_top_five(
    register: Register, classes: int
) -> None:
    wrong = torch.zeros(classes)
    wrong[-1] = 1
    got = result_of(TopKEvaluator(register(classes)), [0, 0, 0, 0], [wrong, wrong, wrong, None])
    assert got["top5"] == pytest.approx(75)
    assert got["top1"] == pytest.approx(75 if classes == 1 else 0)


def test_bad_videos_count_as_wrong_and_are_counted(register: Register, tmp_path: Path) -> None:
    name = register(3)
    evaluator = TopKEvaluator(name, str(tmp_path / "inference"))
    evaluator.reset()
    sure = torch.tensor([0.0, 0.9, 0.1])
    evaluator.process([video(2, 1), video(0, 1)], [{"scores": sure}, {"scores": sure}])
    evaluator.process([video(1, 1, bad="no video stream in it")], [{"scores": None}])
    evaluator.process([video(3, 2)], [{"scores": torch.full((3,), float("nan"))}])
    results = evaluator.evaluate()
    assert results is not None
    assert results["video"] == {
        "top1": 50.0,
        "top5": 50.0,
        "mean_class_acc": pytest.approx(100 / 3),
        "bad": 2,
    }

    lines = (tmp_path / f"inference/predictions_{name}.jsonl").read_text().splitlines()
    documents = [json.loads(line) for line in lines]
    assert [document["video_id"] for document in documents] == [0, 1, 2, 3]
    first = documents[0]
    assert (first["file"], first["label"], first["class"]) == ("/videos/0.mp4", 1, "class 1")
    assert [(one["label"], one["class"]) for one in first["top5"]] == [
        (1, "class 1"),
        (2, "class 2"),
        (0, "class 0"),
    ]
    assert [one["score"] for one in first["top5"]] == pytest.approx([0.9, 0.1, 0.0])
    assert (documents[1]["top5"], documents[1]["bad"]) == ([], "no video stream in it")
    assert documents[3]["bad"] == "scores are not numbers"
    # Row "class 1": two of its three videos were taken for it, so the whole row is in the dark cell of the diagonal.
    picture = cv2.imread(str(tmp_path / f"inference/confusion_{name}.png"))
    margin = 8 + 7 * len("class 0")
    cells = [picture[30 + 24 + 12, margin + 24 * k + 12, ::-1].tolist() for k in range(3)]
    assert cells == [[247, 251, 255], [8, 48, 107], [247, 251, 255]]


def test_a_list_of_numbers_that_lacks_the_highest_class(tmp_path: Path) -> None:
    """Trained on ten classes, tested on videos of nine: the training ended with an error."""
    name = "my/numbers"
    DatasetCatalog.register(name, lambda: [])
    MetadataCatalog.get(name).classes = ["0", "1"]
    try:
        with pytest.raises(ValueError, match="has 2 classes"):
            result_of(TopKEvaluator(name), [1], [[0.1, 0.2, 0.7]])
        evaluator = TopKEvaluator(name, str(tmp_path), num_classes=3)
        assert result_of(evaluator, [1, 0], [[0.1, 0.2, 0.7], [0.5, 0.2, 0.3]])["top1"] == 50.0
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    # A name may have characters that a file name has not.
    lines = (tmp_path / "predictions_my_numbers.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["top5"][0]["class"] == "2" and len(lines) == 2
    assert (tmp_path / "confusion_my_numbers.png").is_file()


def test_a_video_that_comes_twice_counts_once(register: Register) -> None:
    evaluator = TopKEvaluator(register(2))
    evaluator.reset()
    for number, label in ((0, 0), (1, 1), (0, 0)):
        evaluator.process([video(number, label)], [{"scores": torch.tensor([0.8, 0.2])}])
    results = evaluator.evaluate()
    assert results is not None and results["video"]["top1"] == 50
    evaluator.reset()
    assert evaluator.evaluate() == {}


def test_wrong_counts_of_classes_are_told(register: Register) -> None:
    evaluator = TopKEvaluator(register(3))
    with pytest.raises(ValueError, match=r"/videos/0.mp4: scores of shape \(4,\), but t_top_k_0 has 3"):
        evaluator.process([video(0, 1)], [{"scores": torch.ones(4)}])
    with pytest.raises(ValueError, match="/videos/0.mp4: label 3"):
        evaluator.process([video(0, 3)], [{"scores": torch.ones(3)}])


def test_the_table_says_what_is_absent_and_what_is_mistaken() -> None:
    counts, totals = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 0]]), np.array([4, 2, 0])
    lines = class_table(["run", "jump", "swim"], counts, totals).splitlines()[2:]
    assert [" ".join(line.split()) for line in lines] == [
        "run 4 75.00 jump 25.0 %",
        "jump 2 0.00 -",
        "swim 0 - not in this dataset",
    ]


def _evaluate_a_share(folder: str) -> None:
    """Eight videos, of which rank 0 has seen 0 to 4 and rank 1 has seen 4 to 7: one is in both, as if padded."""
    MetadataCatalog.get("shared").classes = ["even", "odd"]
    evaluator = TopKEvaluator("shared", folder)
    evaluator.reset()
    for k in range(5) if comm.get_rank() == 0 else range(4, 8):
        given = {"file_name": str(k), "label": k % 2, "video_id": k}
        # Right for 0 to 5.
        scores = torch.nn.functional.one_hot(torch.tensor(k % 2 if k < 6 else 1 - k % 2), 2).float()
        evaluator.process([given], [{"scores": scores}])
    (Path(folder) / f"rank{comm.get_rank()}").write_text(json.dumps(evaluator.evaluate()))


def test_two_processes_count_every_video_once(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "import json, sys, torch\nfrom pathlib import Path\nimport d2_frozen\n"
        "from detectron2.data import MetadataCatalog\nfrom detectron2.engine import launch\n"
        "from detectron2.utils import comm\nfrom video_app.evaluation import TopKEvaluator\n"
        + inspect.getsource(_evaluate_a_share)
        + "if __name__ == '__main__':\n"
        "    launch(_evaluate_a_share, 2, dist_url='auto', args=(sys.argv[1],))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, str(script), str(tmp_path)], env=environment, check=True)
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1))
    assert first == {"video": {"top1": 75.0, "top5": 100.0, "mean_class_acc": 75.0, "bad": 0}}
    assert second is None
    assert len((tmp_path / "predictions_shared.jsonl").read_text().splitlines()) == 8
