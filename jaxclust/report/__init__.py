"""Pages and pictures made from workdirs; imports neither jax nor tensorflow, so it starts fast."""
