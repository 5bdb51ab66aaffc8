"""The command line: parse, call a stage, print. No maths, and nothing heavy before a command needs it."""
