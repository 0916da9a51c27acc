SIMPLIFY: dict = {}
