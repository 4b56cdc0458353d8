"""How fast does each method train and sample, beside plain code that is timed in the same run?"""
