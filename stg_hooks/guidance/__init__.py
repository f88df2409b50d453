"""From predictions to the guided one: the formula, the settings and when they hold, what is reported."""
