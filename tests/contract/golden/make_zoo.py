"""zoo.json: what Detectron2's model_zoo says of each R-CNN config, as differences from ``get_cfg()``.

    python make_zoo.py NAME.yaml ... > zoo.json

Run with the real Detectron2; only public API is called. One line per name: address of the weights (null where none
were published) and key -> value for every key whose value is not the default; tuples are lists.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode, get_cfg


def differences(cfg: CfgNode) -> dict[str, Any]:
    """Key -> value of everything that is not Detectron2's default, as json has it."""
    default = dict(leaves(get_cfg()))
    changed = {
        key: value
        for key, value in leaves(cfg)
        if (type(value), value) != (type(default.get(key)), default.get(key))
    }
    return json.loads(json.dumps(changed))


def leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def weights_url(name: str) -> str | None:
    from detectron2 import model_zoo

    try:
        return model_zoo.get_checkpoint_url(name)
    except RuntimeError:
        return None


def main(names: list[str]) -> None:
    from detectron2 import model_zoo

    lines = []
    for name in sorted(names):
        facts = {"weights": weights_url(name), "config": differences(model_zoo.get_config(name))}
        lines.append(f"{json.dumps(name)}: {json.dumps(facts, sort_keys=True)}")
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main(sys.argv[1:])
