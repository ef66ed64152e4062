"""What every structured pruning shares: criteria, selection, schedules, the sensitivity scan and the control harness.

A criterion is a callable that scores the units of coupled groups (`criteria`, `activations`); `scope` and `plan` say
what may be cut and how much, `selection` which units, `dead_units` those that do nothing; `schedule` cuts and retrains,
`sensitivity` scans layers, and `harness` compares criteria under one protocol.
"""
