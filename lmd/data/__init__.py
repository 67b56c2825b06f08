"""From scores and audio folders to stems, captions and latents."""
