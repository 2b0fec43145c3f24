"""How similar are two feature maps of trained models? Linear CKA over images or clips: ``study cka``."""
