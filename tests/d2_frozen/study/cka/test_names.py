"""Names of feature maps."""

from __future__ import annotations

import pytest
import torch

from d2_frozen.study.cka.names import matcher, matching, tensors_in, tensors_in_arguments

MAP, NUMBERS, VECTOR = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2)


def test_items_of_dicts_and_lists_have_names() -> None:
    value = {"p3": MAP, "rest": [MAP, (MAP, None)], "ids": NUMBERS, "one": VECTOR, "other": object()}
    names = [name for name, _ in tensors_in(value, "m")]
    assert names == ["m[p3]", "m[rest][0]", "m[rest][1][0]"]
    assert [name for name, _ in tensors_in(MAP, "m")] == ["m"]


def test_a_single_argument_stands_for_itself() -> None:
    assert [name for name, _ in tensors_in_arguments((MAP,), {}, "m:input")] == ["m:input"]
    assert [name for name, _ in tensors_in_arguments(([MAP, MAP],), {}, "m:input")] == [
        "m:input[0]",
        "m:input[1]",
    ]
    assert [name for name, _ in tensors_in_arguments((MAP, 1), {"x": MAP}, "m:input")] == [
        "m:input[0]",
        "m:input[x]",
    ]


def test_brackets_stand_for_themselves_and_inputs_are_named() -> None:
    assert matcher("a*[p?]")("a.b[p3]") and not matcher("a[p3]")("ap")
    assert matcher("a*")("a.b") and not matcher("a*")("a.b:input")
    assert matcher("a*:input*")("a.b:input[0]") and not matcher("a*:input*")("a.b")


def test_an_unknown_name_lists_the_nearest() -> None:
    names = ["backbone.layers.0[0]", "roi_heads.box_head.fc1", "roi_heads.box_head.fc1:input", "rpn.conv"]
    assert matching("roi_heads.*", names) == ["roi_heads.box_head.fc1"]
    with pytest.raises(
        ValueError, match=r"no feature map fits 'roi_head.box\*'. Nearest: roi_heads.box_head.fc1,"
    ):
        matching("roi_head.box*", names)
