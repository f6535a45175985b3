"""The doctor: what this environment would serve, and what stands in its way.

Each check is a row of ``command.CHECKS``; its probe returns a ``CheckResult``, and a probe that
fails is a result too. Nothing is changed, no port is opened, and torch is imported only to ask a
device, in a process of its own: a driver that hangs or crashes takes no more than that process with
it.
"""
