"""What a learner is made of: `assemble` puts an engine together, `loop` runs meta-training."""
