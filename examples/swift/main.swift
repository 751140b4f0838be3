// Streams one answer from `ifprune serve` (http://127.0.0.1:8080) with URLSession and nothing else.
//
//     ifprune serve                                     # in one terminal
//     swiftc -parse-as-library main.swift -o ask        # in another; macOS 12 or later
//     ./ask "Why is the sky blue?"
//
// Not compiled or run where this project is developed, which has no Swift.

import Foundation

struct Message: Codable {
    let role: String
    let content: String
}

struct Ask: Encodable {
    struct Wish: Encodable {
        let density: Double
    }

    let model = "default"
    let stream = true
    let messages: [Message]
    let ifprune: Wish
}

struct Chunk: Decodable {
    struct Choice: Decodable {
        struct Delta: Decodable {
            let content: String?
        }

        let delta: Delta
    }

    struct Figures: Decodable {
        let selection: String?
        let density: Double
        let select_s: Double
        let tokens_per_s: Double
    }

    let choices: [Choice]
    let ifprune: Figures?
}

@main
struct Main {
    static func main() async throws {
        let question = CommandLine.arguments.dropFirst().joined(separator: " ")
        var request = URLRequest(url: URL(string: "http://127.0.0.1:8080/v1/chat/completions")!)
        request.httpMethod = "POST"
        request.setValue("application/json", forHTTPHeaderField: "Content-Type")
        if let key = ProcessInfo.processInfo.environment["IFPRUNE_API_KEY"] {
            request.setValue("Bearer \(key)", forHTTPHeaderField: "Authorization")
        }
        request.httpBody = try JSONEncoder().encode(
            Ask(messages: [Message(role: "user", content: question)], ifprune: .init(density: 0.75)))

        let (bytes, response) = try await URLSession.shared.bytes(for: request)
        guard (response as? HTTPURLResponse)?.statusCode == 200 else {
            for try await line in bytes.lines { print(line) }  // the error, as JSON
            exit(1)
        }
        for try await line in bytes.lines where line.hasPrefix("data: ") {
            let data = line.dropFirst("data: ".count)
            if data == "[DONE]" { break }
            let chunk = try JSONDecoder().decode(Chunk.self, from: Data(data.utf8))
            print(chunk.choices.first?.delta.content ?? "", terminator: "")
            fflush(stdout)
            if let figures = chunk.ifprune {
                print("\n[density \(figures.density), selected in \(figures.select_s) s, \(figures.tokens_per_s) tokens/s]")
            }
        }
    }
}
