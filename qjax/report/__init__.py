"""Tables and figures: functions of rows alone."""
