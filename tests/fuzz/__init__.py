"""Changes files of every format that the package reads, and judges what the commands make of them."""
