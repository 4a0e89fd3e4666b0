"""Intervals, paired differences and tests; no other room computes them.

Two kinds of chance are kept apart. Over images (:mod:`~localign.statistics.bootstrap`): how the same models would do
on other images. Over seeds (:mod:`~localign.statistics.student_t`, :mod:`~localign.statistics.paired`): how other runs
of the same training would do on the same images. All intervals are 95 % intervals.
"""
