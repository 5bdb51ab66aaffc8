"""What a chunk of the divergence leaves of each token."""

from enum import IntEnum


class Value(IntEnum):
    """What is kept of each token: numbers of this rank's shard, from which those of the complete vocabulary follow."""

    TEACHER_PEAK = 0  # largest logit, before the temperature
    TEACHER_MASS = 1  # sum of exp((logit - peak) / T)
    STUDENT_PEAK = 2
    STUDENT_MASS = 3
    TERMS = 4  # forward KL: sum of exp(t) (t - s), where t and s are (logit - peak) / T; else the shard's part of D
    STUDENT_AT_TOP = 5  # the student's logit at the teacher's largest
    TEACHER_LABEL = 6  # the label's logit, 0 if it is another rank's
    STUDENT_LABEL = 7
    LABEL_FOUND = 8
    TEACHER_MASS_1 = 9  # the masses at temperature 1
    STUDENT_MASS_1 = 10
