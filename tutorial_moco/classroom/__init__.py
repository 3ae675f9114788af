"""Assignments: made from one source, checked by the student, graded by nbgrader, safely and with reasons.

`exam` is what hidden tests are written with; `rescue` finds a student's work in any notebook and puts it into a clean one;
`kernel` runs it within limits; `release` makes the student versions; `grade` takes a folder or zip of submissions.
"""
