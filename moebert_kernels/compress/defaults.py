"""What is taken where nobody says otherwise, by the library and by the command line, which reads it alone."""

ROUTING = "hash-affinity"
# Needs neither scores per token, as ROUTING does, nor rows: for experts cut without a look at the data.
ROUTING_WITHOUT_DATA = "hash-random"
NUM_EXPERTS = 4
COMPARISONS: tuple[str, ...] = ()  # each costs as much as the student
IMPORTANCE_ROWS = 4096
FIT_ROWS = 4096
EPOCHS = 5.0  # of distillation
FINETUNE_EPOCHS = 3.0
FINETUNE_LEARNING_RATE = 3e-5
DISTILL_WEIGHT = 1.0
BATCH_SIZE = 32
WEIGHT_DECAY = 0.0  # of distillation
WARMUP = 0.0  # of distillation
FINETUNE_WEIGHT_DECAY = 0.01
