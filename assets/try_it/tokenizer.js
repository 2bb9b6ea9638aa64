// One character, one token: a token's number is the character's place in the vocabulary.

export class Tokenizer {
  /** @param {string} characters The vocabulary, in the order of the tokens. */
  constructor(characters) {
    this.characters = [...characters];
    this.numbers = new Map(this.characters.map((character, number) => [character, number]));
  }

  /**
   * Token numbers of the characters that the vocabulary has, and, each once, the characters that it lacks.
   * @param {string} text
   * @returns {{tokens: number[], unknown: string[]}}
   */
  encode(text) {
    const tokens = [], unknown = new Set();
    for (const character of text) { // by code point, so that an emoji is one character
      const token = this.numbers.get(character);
      if (token === undefined) unknown.add(character);
      else tokens.push(token);
    }
    return { tokens, unknown: [...unknown] };
  }

  /**
   * @param {Iterable<number>} tokens
   * @returns {string}
   */
  decode(tokens) {
    return Array.from(tokens, (token) => this.characters[token]).join("");
  }
}
