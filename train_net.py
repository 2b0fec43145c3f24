#!/usr/bin/env python3
"""Train or evaluate by config; see ``python train_net.py --help``."""

from d2_frozen.train_net import console_main

if __name__ == "__main__":
    console_main()
