"""Clips: video files and frame folders -> pixels. Without torch, since decoder processes import it too."""
