"""``python -m seg_app``: train or evaluate semantic segmentation; the flags are those of ``train_net.py``."""

from d2_frozen.train_net import app_main

if __name__ == "__main__":
    app_main("seg_app")
