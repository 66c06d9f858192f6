"""Side by side: the same load and the same engines behind lltm_ray and behind what people use instead of it."""
