"""The harness of the paper: its reported numbers, runs and their records, tables and figures."""
