"""What a token costs, measured (`bench`) and foretold (`plan`).

`cost` is pure: measurements in, predictions out. `device`, `link` and `server` measure, `report` words it, `remembered`
keeps the partition that was chosen.
"""
