"""The memory that training needs on each device: a function of sizes, without a value of the model."""
