from local.models import *  # noqa
