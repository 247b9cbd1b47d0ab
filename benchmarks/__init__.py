"""What jaxclust is measured against; `make bench` runs every script but `uad_ablation`, which takes hours."""
