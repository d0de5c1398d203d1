"""Exposure bias (paper, Fig. 3): measured per sample, compared between arms, with intervals."""
