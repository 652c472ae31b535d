"""What the benchmarks measure, and what they write. Needs torch alone; tools/ has the commands."""
