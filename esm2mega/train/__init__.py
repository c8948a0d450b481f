"""From packs to updated weights: loss, step, loop."""
