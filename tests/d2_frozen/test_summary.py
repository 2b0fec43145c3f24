"""``python -m d2_frozen.summary`` says what is wrong in one line, and leaves nothing out in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2_frozen import summary


def test_wrong_calls_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("MODEL: {MASKON: True}\n")
    with pytest.raises(SystemExit, match=r"^error: .*MASKON"):
        summary.main(["--config-file", str(config)])
    with pytest.raises(SystemExit, match=r"^error: no config file .*b\.yaml"):
        summary.main(["--config-file", str(tmp_path / "b.yaml")])
    with pytest.raises(SystemExit, match=r"^error: no config of a model .* in .*none\.$"):
        summary.main(["--table", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        summary.main(["--table", str(tmp_path), "MODEL.MASK_ON", "False"])
    assert "MODEL.MASK_ON: KEY VALUE options are for --config-file" in capsys.readouterr().err
