"""The library's verbs that change what an image shows, with the guard: what is behind ``cowhand.commit`` and its like."""

from cowhand.copy.ops.convert import convert as _convert
from cowhand.copy.ops.dd import dd as _dd
from cowhand.image.create import create as _create
from cowhand.jobs.commit import commit as _commit
from cowhand.jobs.rebase import rebase as _rebase
from cowhand.plans.guard import guarded

commit = guarded(_commit)
convert = guarded(_convert)
create = guarded(_create)
dd = guarded(_dd)
rebase = guarded(_rebase)
