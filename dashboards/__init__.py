"""Grafana dashboards, Prometheus rules and docs/metrics.md, all made from data in these modules: `python -m dashboards`.

The series that they may use are those of `tierd.series`. What is made is in the repository; a test makes it again and compares.
"""
