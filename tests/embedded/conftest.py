"""These tests are about the embedded engine; with an installed Detectron2 there is nothing to test here."""

import d2_frozen

collect_ignore_glob = ["test_*.py"] if d2_frozen.engine_name() != "embedded" else []
