"""The checks: each is a module with `run(report, device, shapes, place)`, started in a process of its own."""
