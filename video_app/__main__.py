"""``python -m video_app``: train or evaluate action recognition; the flags are those of ``train_net.py``."""

from __future__ import annotations

import sys

from d2_frozen import tasks
from d2_frozen.train_net import argument_parser, console_main


def main() -> None:
    args = argument_parser().parse_args()
    task = tasks.task_of(tasks.read_config(args.config_file, args.opts))
    if task.name != "action recognition":
        own = ", ".join(name for name, app in tasks.APPS.items() if app == "video_app")
        sys.exit(
            f"python -m video_app: {args.config_file or 'the default config'} is a config of {task.name}: its "
            f"MODEL.META_ARCHITECTURE is none of {own}. train_net.py runs any task."
        )
    console_main()


if __name__ == "__main__":
    main()
