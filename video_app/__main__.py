"""``python -m video_app``: train or evaluate action recognition; the flags are those of ``train_net.py``."""

from d2_frozen.train_net import app_main

if __name__ == "__main__":
    app_main("video_app")
