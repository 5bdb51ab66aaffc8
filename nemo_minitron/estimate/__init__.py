"""What a run will cost before it is paid for: memory of a rank, work, time. Arithmetic on sizes; nothing is built."""
