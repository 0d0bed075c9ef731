// Small things a browser keeps. A storage that is full or closed keeps nothing, and nobody depends on it.

/** Return what is kept under a key, or null. */
export function recall(key, storage = "localStorage") {
  try {
    return window[storage].getItem(key);
  } catch {
    return null;
  }
}

/** Keep a text, or nothing more for an empty one. */
export function remember(key, text, storage = "localStorage") {
  try {
    if (text) window[storage].setItem(key, text);
    else window[storage].removeItem(key);
  } catch {
    // then it is forgotten
  }
}
