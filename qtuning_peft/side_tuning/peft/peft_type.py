"""``QST`` as a member of PEFT's enum: the one place that touches it.

PEFT has a public function for outside methods, `peft.utils.register_peft_method`, but it only accepts names
that are members of the `PeftType` enum, and has no entry point to add one. So one true member is made here,
once, and everything after that is PEFT's own registry.
"""

from peft.utils.peft_types import PeftType

NAME = "QST"
PREFIX = "qst_"


def _peft_type() -> PeftType:
    if NAME not in PeftType.__members__:
        # A str-enum member is a str that carries its name and value; the three maps are what
        # `PeftType(value)`, `PeftType.QST` and iteration look at. Calling the class would only look it up.
        member = str.__new__(PeftType, NAME)
        member._name_ = NAME
        member._value_ = NAME
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
        if not hasattr(PeftType, NAME):
            type.__setattr__(PeftType, NAME, member)
    return PeftType(NAME)


QST: PeftType = _peft_type()
