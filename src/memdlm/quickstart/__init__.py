"""The main job of a newcomer: train, compare and look, in ten minutes on a laptop."""
