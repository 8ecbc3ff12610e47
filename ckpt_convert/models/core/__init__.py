"""What tables are written in (rows, keys, builders), their checks, and the readers of configs."""
