"""Jobs, one file each with `run(config, workdir, options)`, found by its name."""
