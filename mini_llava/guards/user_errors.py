"""The errors that end a program with a sentence: ours, those of the files that may be copied alone, the system's."""

from ..data.sampler import OrderError
from ..data.templates import BadRecord, TemplateError
from ..errors import UserError
from ..model.projector import ProjectorError

USER_ERRORS = (UserError, BadRecord, OrderError, ProjectorError, TemplateError, OSError)
